"""`./dev fuzz [TARGET] [OPTIONS]`: runs every fuzz target beside this file, or one of them with its own options.

Targets: frontend_backend (parsers and pages), instance (hostile commands in real instances),
control (hostile control and data channels of `qemu` and of vtpm-swtpm), kill (kill -9 under load),
anchors (power cuts and TPM resets between any two TPM commands), quotes (bundles and enrolment documents),
hibernation (kill -9 at each step of going to sleep and waking), migration (kill -9 of either manager at each step),
blobs (kill -9 at each step of a save, the first use after it, and a restore),
xen (lives of Xen devices with mishaps between any two steps, and hostile guests).
All take --seconds N and --seed S; instance, kill, hibernation, migration and blobs --minutes M; instance --replay FILE;
xen --replay SEED.
"""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = {path.stem.removeprefix("fuzz_"): path for path in sorted(HERE.glob("fuzz_*.py"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS), help="default: all")
    options, rest = parser.parse_known_args()
    for name in [options.target] if options.target else sorted(TARGETS):
        sys.stderr.write(f"fuzz {name}\n")
        words = rest or ["--seconds", "60"]
        done = subprocess.run([sys.executable, str(TARGETS[name]), *words], check=False)
        if done.returncode:
            return done.returncode
    sys.stdout.write("fuzz: nothing broke\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

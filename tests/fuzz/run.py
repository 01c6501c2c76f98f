"""`./dev fuzz [TARGET] [--seconds N]`: runs every fuzz target beside this file, or one of them, for N seconds each."""

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = {path.stem.removeprefix("fuzz_"): path for path in sorted(HERE.glob("fuzz_*.py"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", choices=sorted(TARGETS), help="default: all")
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    for name in [options.target] if options.target else sorted(TARGETS):
        sys.stderr.write(f"fuzz {name} for {options.seconds} s\n")
        done = subprocess.run([sys.executable, str(TARGETS[name]), "--seconds", str(options.seconds)], check=False)
        if done.returncode:
            return done.returncode
    sys.stdout.write("fuzz: nothing broke\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

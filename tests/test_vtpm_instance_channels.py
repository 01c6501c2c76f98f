"""A short, seeded run of `./dev fuzz control`: hostile peers on both channels of two real processes."""

import sys
from contextlib import ExitStack
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "fuzz"))

from emulator_backend import end_all
from fuzz_control import QemuVictim, SwtpmVictim, fuzz

SECONDS = 5.0
SEED = 20261121


def test_hostile_peers_on_both_channels_end_nothing_and_leave_nothing_behind() -> None:
    with ExitStack() as stack:
        stack.callback(end_all)
        assert fuzz([QemuVictim(stack), SwtpmVictim(stack)], SEED, SECONDS, sys.stdout.write)

"""kill -9 of a real manager between two TPM commands: what was acknowledged is there, and the next start is served."""

import os
import signal
from pathlib import Path

import pytest
from e2e_rig import Guest, Installation, wait_for
from fixtures_tpm import BusRelay, recorded_bus, running_swtpm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
# A manager is killed in its opening anchors, in what a save and an add have anchored, and in its stop. `./dev fuzz
# anchors` takes every place, inside one process.
LATER = (8,)  # TPM commands that still pass
ADDS = 20  # more than make 8 TPM commands: an add awaits its durable anchor


class Killer(BusRelay):
    """A relay that kills the manager instead of passing the command on."""

    made: Installation

    def _is_the_last(self, _far: object, _packet: bytes) -> bool:
        if self.cut_at is None:
            return False
        self.cut_at -= 1
        if self.cut_at >= 0:
            return False
        self.cut_at, self.was_cut = None, True
        assert self.made.manager is not None
        os.kill(self.made.manager.pid, signal.SIGKILL)
        return True


def gone(made: Installation) -> None:
    assert made.manager is not None
    assert made.manager.wait(30) == -signal.SIGKILL
    made.manager = None


def test_killed_between_tpm_commands_nothing_acknowledged_is_lost(bare: Installation, tmp_path: Path) -> None:
    with running_swtpm(tmp_path) as chip, recorded_bus(chip) as bus:
        bus.__class__ = Killer
        bus.made = bare  # type: ignore[attr-defined]
        bare.init(tcti=f"swtpm:path={bus.path}")
        before = len(bus.commands)
        bare.start()
        start = len(bus.commands) - before
        bare.add("web")
        guest = Guest(bare.attach("web")["endpoint"])
        guest.define(INDEX, 8)
        written, added = b"%08d" % 0, {"web"}
        guest.write(INDEX, written)
        guest.close()
        assert bare.stop() == 0
        assert start > 20
        for place in (start - 2,):
            bus.cut_at, bus.was_cut = place, False
            bare.spawn()
            gone(bare)
            assert bus.was_cut
        bare.start()
        for number, place in enumerate(LATER, 1):
            guest = Guest(bare.show("web")["endpoint"])
            guest.write(INDEX, written := b"%08d" % number)
            guest.close()
            bus.was_cut = False
            bus.cut_at = place
            for attempt in range(ADDS):  # the save's background extend may have come before the cut was set
                name = f"vtpm-{number}-{attempt}"
                if bare.command("vtpm-add", "--name", name, check=False).code == 0:
                    added.add(name)
                if bus.was_cut:
                    break
            wait_for(lambda: bus.was_cut, "the kill")
            gone(bare)
            bare.start()
            guest = Guest(bare.show("web")["endpoint"])
            assert guest.read(INDEX, 8) == written
            guest.close()
            assert added <= {row["name"] for row in bare.command("vtpm-list", "--json").json}
        bus.cut_at = 3
        assert bare.manager is not None
        bare.manager.send_signal(signal.SIGTERM)
        gone(bare)
        bare.start()
        assert bare.show("web")["state"] in ("running", "needs-reset", "down", "starting")
        bare.command("vtpm-reset-platform", "web")
        guest = Guest(bare.show("web")["endpoint"])
        assert guest.read(INDEX, 8) == written
        guest.close()
        assert bare.stop() == 0

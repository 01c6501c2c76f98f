"""Out of room: said before anything is spent, while everybody who runs goes on."""

import subprocess
from collections.abc import Iterator

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import BIN, Guest, Installation, installation, wait_for

_DESCRIPTORS = 780  # a manager keeps 768 for itself
ROOM = 12


class Narrow(Installation):
    """An installation whose manager, and all that it starts, may have few descriptors."""

    def start(self) -> None:
        places = ("--state-dir", str(self.state), "--runtime-dir", str(self.runtime))
        limited = ("prlimit", f"--nofile={_DESCRIPTORS}:{_DESCRIPTORS}", str(BIN / "vtpm-manager"), "run", *places)
        with self.log.open("ab") as log:
            self.manager = subprocess.Popen(limited, stderr=log)
        wait_for(self._ready, "the manager")


@pytest.fixture
def narrow() -> Iterator[Installation]:
    with installation(Narrow) as made:
        made.init()
        made.start()
        yield made


def test_a_manager_without_descriptors_refuses_one_more_and_serves_the_rest(narrow: Installation) -> None:
    narrow.command("vtpm-add", "--count", str(ROOM + 1), "--name", "vm-{}")
    before = narrow.vtpm_manager("status", "--json").json["descriptors"]
    shown = [narrow.attach(f"vm-{number}") for number in range(1, ROOM + 1)]
    refused = narrow.command("vtpm-attach", f"vm-{ROOM + 1}", "guest", check=False)
    assert refused.code == 8, refused.err
    assert "LimitNOFILE" in refused.err
    status = narrow.vtpm_manager("status", "--json").json
    assert (status["running"], status["running_most"], status["descriptors_most"]) == (ROOM, ROOM, _DESCRIPTORS)
    assert status["descriptors"] - before == ROOM, "one for each"
    for one in shown:
        guest = Guest(one["endpoint"])
        guest.good(tpm.get_random(4))
        guest.close()
    narrow.command("vtpm-detach", "vm-1")
    narrow.attach(f"vm-{ROOM + 1}")

"""Killed over a save, the first use after it, or a restore: no volatile state lives twice, no NV is lost."""

import itertools
from collections.abc import Iterator

import pytest
from blob_client import Machine
from blob_deaths import DEATHS, Death, die
from e2e_rig import Installation, installation
from killed_commands import needs_strace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
# one each at which the next start finds something else: asked, written, flushed, told, answered
STEPS = (
    "export-instance-sendto-1", "export-manager-sendto-1",
    "use-instance-fdatasync-1", "use-instance-sendto-1", "use-instance-sendto-2", "use-instance-fdatasync-2",
    "use-manager-fdatasync-1", "use-manager-sendto-1",
    "restore-instance-sendto-3", "restore-instance-fdatasync-1", "restore-instance-sendto-11",
    "restore-instance-sendto-13", "restore-instance-sendto-14", "restore-instance-sendto-15",
    "restore-instance-sendto-16",
    "restore-manager-sendto-1", "restore-manager-fdatasync-1", "restore-manager-sendto-2",
)  # fmt: skip
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def vtpms() -> Iterator[Installation]:
    needs_strace()
    with installation() as made:
        made.init()
        made.start()
        yield made


@pytest.fixture(autouse=True)
def _no_machine_is_left() -> Iterator[None]:
    yield
    while Machine.open:
        Machine.open.pop().close()


def test_the_steps_are_steps() -> None:
    assert set(STEPS) <= {str(death) for death in DEATHS}


@pytest.mark.parametrize("death", [death for death in DEATHS if str(death) in STEPS], ids=str)
def test_no_state_lives_twice_and_nothing_acknowledged_is_lost(vtpms: Installation, death: Death) -> None:
    died = die(vtpms, f"vtpm-of-{next(_numbers)}", death)
    assert died or death.number > 1, "nobody died: the step has no such call any more"


def test_everything_is_sound_at_the_end(vtpms: Installation) -> None:
    assert vtpms.command("vtpm-verify", "--all").code == 0

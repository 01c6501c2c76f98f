"""Killed at a step of going to sleep or of waking: no volatile state is used twice, none is lost without a word.

A death of each process at each kind of step; `./dev fuzz hibernation` has all of them.
"""

from collections.abc import Iterator

import pytest
from e2e_rig import Installation, installation
from hibernation_deaths import DEATHS, Death, Extender, die
from killed_commands import needs_strace

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
# the steps between which the next start finds something else: what was saved, who was told, whose turn it was
STEPS = (
    "instance-fdatasync-1", "instance-sendmsg-1", "instance-exit_group-1",
    "waking-sendto-1", "waking-pread64-1", "waking-sendto-2", "waking-recvfrom-1",
    "manager-sendmsg-1", "manager-sendmsg-4", "manager-recvmsg-6", "manager-fdatasync-1",
    "keeper-recvmsg-2", "keeper-epoll_ctl-5", "spawner-clone-1",
)  # fmt: skip


@pytest.fixture(scope="module")
def extender() -> Iterator[Extender]:
    needs_strace()
    with installation() as made:
        made.init()
        made.start()
        made.add("web")
        guest = Extender(made, "web", made.attach("web")["endpoint"])
        yield guest
        guest.guest.close()


def test_the_steps_are_steps() -> None:
    assert set(STEPS) <= {str(death) for death in DEATHS}


@pytest.mark.parametrize("death", [death for death in DEATHS if str(death) in STEPS], ids=str)
def test_every_acknowledged_extend_is_there_or_a_reset_is_asked_for(extender: Extender, death: Death) -> None:
    die(extender, death)


def test_a_death_before_its_state_is_used_up_costs_no_reset(extender: Extender) -> None:
    resets = extender.resets
    die(extender, Death("waking", "flock", 1))  # it has not asked yet: what stands on the ring may be read at any time
    assert extender.resets == resets, "nobody had its key: it is resumed by the next instance"


def test_a_death_after_its_state_was_used_up_asks_for_a_reset(extender: Extender) -> None:
    resets = extender.resets
    die(extender, Death("waking", "getrandom", 1))  # it stirs its random state; the image it read before it had the key
    assert extender.resets == resets + 1, "it had the key, so nobody else gets it"


def test_everything_runs_at_the_end_and_nothing_is_left_over(extender: Extender) -> None:
    made: Installation = extender.made
    extender.guest.close()
    made.command("vtpm-detach", "web")
    status = made.vtpm_manager("status", "--json").json
    assert (status["running"], status["hibernated"]) == (0, 0)
    assert made.command("vtpm-verify", "--all").code == 0

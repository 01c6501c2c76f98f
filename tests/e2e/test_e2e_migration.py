"""A vTPM moves between two managers, each with a hardware TPM of its own; and everything that must not move it."""

from collections.abc import Iterator

import pytest
import vtpm_instance_rig as tpm
from blob_client import Machine, Refused
from e2e_rig import wait_for
from migration_rig import INDEX, Guest, Host, hosts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Host]]:
    with hosts("north", "south") as made:
        yield made


def test_a_vtpm_moves_with_all_it_has_and_cannot_be_started_where_it_was(pair: list[Host]) -> None:
    north, south = pair
    guest = Guest(north)
    guest.allow(south)
    assert south.show(guest.name)["state"] == "incoming"
    saved = guest.saved()
    machine = guest.incoming(south)
    machine.restore(saved)
    guest.check(machine)
    machine.good(tpm.nv_write(INDEX, b"on south"))
    guest.moved()
    shown = north.show(guest.uuid)
    assert (shown["migrated_to"], shown["state"]) == ("south", "removed")
    assert north.command("vtpm-attach", guest.uuid, "x", check=False).code == 3
    with pytest.raises(OSError):
        guest.machine.good(tpm.nv_read(INDEX, 8))
    assert south.show(guest.name)["state"] == "running"
    assert north.command("vtpm-verify", "--all", check=False).code == 0, "nothing is left that disagrees"
    assert south.command("vtpm-verify", "--all", check=False).code == 0

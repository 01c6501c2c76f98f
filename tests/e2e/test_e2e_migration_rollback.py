"""Backups of either manager from before or amid a migration: going back to one never makes two of a vTPM."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from blob_client import Machine
from migration_rig import INDEX, Guest, Host, hosts

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def pair() -> Iterator[list[Host]]:
    with hosts("north", "south") as made:
        yield made


def put_back(host: Host, backup: Path) -> None:
    """Restore a backup in place of what is there; the hardware TPM, which is not in it, stays as it is."""
    host.die()
    hardware = host.base / "embedded-tpm"
    shutil.move(host.state / "embedded-tpm", hardware)
    shutil.rmtree(host.state)
    host.vtpm_manager("restore", str(backup))
    shutil.move(hardware, host.state / "embedded-tpm")


def test_an_old_source_cannot_run_what_left_and_gets_it_back_only_from_who_has_it(pair: list[Host]) -> None:
    north, south = pair
    guest, stays = Guest(north), Guest(north)
    guest.allow(south)
    backup = north.base / "north.tar"
    north.vtpm_manager("backup", str(backup))
    machine = guest.incoming(south)
    machine.restore(guest.saved())
    guest.check(machine)
    guest.moved()
    old_identity = north.certificate.read_text()
    put_back(north, backup)
    assert north.try_start() == 6, "the anchors do not stand for that store"
    told = north.vtpm_manager("accept-rollback", "--json", check=False)
    assert "may have left for south" in told.out, told.out + told.err
    north.vtpm_manager("accept-rollback", "--key", str(north.recovery))
    north.start()
    assert north.show(guest.name)["state"] == "frozen"
    assert north.command("vtpm-attach", guest.name, "x", "--frontend", "qemu", check=False).code == 4
    assert north.show(stays.name)["state"] != "frozen", "only what was authorised to leave"
    north.identify()
    assert north.certificate.read_text() != old_identity, "a copy cannot speak in its name"
    refused = north.command("vtpm-migrate-reclaim", guest.name, "--yes", check=False)
    assert refused.code == 8, "south does not know the new identity"
    south.authorise(north, "--come", guest.uuid)
    assert north.command("vtpm-migrate-reclaim", guest.name, "--yes", check=False).code == 4, "south has it"
    north.command("vtpm-migrate-release", guest.name, "--yes")
    guest.check(machine)
    assert south.show(guest.name)["state"] == "running"


def test_an_old_destination_cannot_repeat_its_claim(pair: list[Host]) -> None:
    north, south = pair
    guest = Guest(north)
    guest.allow(south)
    saved, machine = guest.saved(), guest.incoming(south)
    for kind, (flags, blob) in sorted(saved.items()):
        if blob:
            machine.put(kind, flags, blob)
    backup = south.base / "south.tar"
    south.vtpm_manager("backup", str(backup))  # amid the claim
    south.add("later")
    put_back(south, backup)
    south.vtpm_manager("accept-rollback", "--key", str(south.recovery))
    south.start()
    again = guest.incoming(south)
    with pytest.raises(Exception, match="control command"):
        again.restore(saved)
    assert north.state_of(guest.name) == "frozen"
    again.end()
    south.identify()
    north.authorise(south, "--leave", guest.name)  # under its new identity
    refused = north.command("vtpm-migrate-reclaim", guest.name, "--yes", check=False)
    assert (refused.code, "--destination-is-gone" in refused.err) == (4, True), "who claimed it is not there any more"
    north.command("vtpm-migrate-reclaim", guest.name, "--yes", "--destination-is-gone")
    source = Machine(north.attach(guest.name, guest.name, "--frontend", "qemu")["control"])
    source.boot()
    assert tpm.nv_content(source.good(tpm.nv_read(INDEX, 8))) == guest.content

"""A vTPM moves between two managers, each with a hardware TPM of its own; and everything that must not move it."""

import threading
import time
from collections.abc import Iterator
from uuid import UUID, uuid4

import pytest
import trio
import vtpm_instance_rig as tpm
from blob_client import Machine, RefusedError
from e2e_rig import wait_for
from migration_rig import INDEX, Guest, Host, Wire, hosts

from frontend_backend import messages_migration as m
from frontend_backend.state_blob import BlobHeader
from manager.errors import ManagerError
from manager.migration_identity import make, parse_certificate, tls_context
from manager.migration_state import Identity
from manager.migration_wire import ask, parse_address

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


def test_an_incoming_vtpm_starts_from_nothing_but_its_claimed_state(pair: list[Host]) -> None:
    north, south = pair
    guest = Guest(north)
    guest.allow(south)
    assert south.command("vtpm-attach", guest.name, "x", check=False).code == 4, "no other front end"
    assert south.command("vtpm-reset", guest.name, "--yes", check=False).code == 4
    assert south.command("vtpm-add", "--uuid", guest.uuid, check=False).code == 4
    machine = guest.incoming(south)
    with pytest.raises(RefusedError):
        machine.call(2, bytes(4))  # INIT without a state would make a new TPM
    assert south.show(guest.name)["generation"] == 0
    machine.end()
    south.command("vtpm-detach", guest.name)
    assert south.show(guest.name)["state"] == "incoming"
    guest.check(guest.machine)
    south.command("vtpm-remove", guest.name, "--yes")
    guest.allow(south)  # no tombstone is in the way
    assert south.show(guest.name)["state"] == "incoming"


def test_a_state_that_is_not_the_newest_does_not_move(pair: list[Host]) -> None:
    north, south = pair
    guest = Guest(north)
    guest.allow(south)
    saved = guest.saved()
    guest.machine.good(tpm.nv_write(INDEX, b"newer---"))
    machine = guest.incoming(south)
    with pytest.raises(RefusedError):
        machine.restore(saved)
    assert "used after" in south.show(guest.name)["restore_refused"]
    assert north.show(guest.name)["state"] == "running"
    assert tpm.nv_content(guest.machine.good(tpm.nv_read(INDEX, 8))) == b"newer---", "its guest goes on"
    assert any("stale" in text for text in north.events("migration-refused"))
    machine.end()
    south.command("vtpm-detach", guest.name)
    again = guest.incoming(south)
    again.restore(guest.saved())
    guest.content = b"newer---"
    guest.check(again)
    guest.moved()


def test_a_vtpm_moves_back_to_where_it_came_from(pair: list[Host]) -> None:
    north, south = pair
    guest = Guest(north)
    guest.allow(south)
    machine = guest.incoming(south)
    machine.restore(guest.saved())
    guest.moved()
    south.authorise(north, "--leave", guest.name)
    north.authorise(south, "--come", guest.uuid)
    north.command("vtpm-migrate-expect", "south", guest.uuid, "--name", guest.name)
    saved = machine.save()
    back = guest.incoming(north)
    back.restore(saved)
    guest.check(back)
    wait_for(lambda: south.state_of(guest.uuid) == "removed", "the confirmation")


# --- claims that are none ----------------------------------------------------------------------------


class Stranger:
    """Somebody who speaks the managers' protocol with a key of his own."""

    def __init__(self, host: Host, name: str) -> None:
        self.host, self.name, self.identity = host, name, make(uuid4())
        self.file = host.base / f"{name}.pem"
        self.file.write_text(self.identity.certificate)

    def authorise(self, *options: str) -> None:
        self.host.command("vtpm-migrate-authorise", self.name, "--certificate", str(self.file), *options)

    def ask(self, request: m.MigrationRequest, identity: Identity | None = None) -> m.MigrationReply:
        certificate = self.host.certificate.read_text()
        context = tls_context(identity or self.identity, [certificate], server=False)
        pinned = parse_certificate(certificate)[1]
        return trio.run(ask, parse_address(self.host.address), context, pinned, request)

    def claim(self, guest: Guest, header: bytes, claim: bytes = b"c" * 16) -> m.MigrationReply:
        return self.ask(m.Claim(UUID(guest.uuid).bytes, header[:160], claim))


def code(reply: m.MigrationReply) -> m.MigrationRefusal:
    assert isinstance(reply, m.Refused), reply
    return reply.code


def test_who_is_not_paired_or_not_any_more_gets_no_answer(pair: list[Host]) -> None:
    north, _ = pair
    guest, stranger = Guest(north), Stranger(north, "mallory")
    header = guest.saved()[1][1]
    with pytest.raises(ManagerError, match="certificate"):
        stranger.claim(guest, header)
    stranger.authorise("--leave", guest.name)
    with pytest.raises(ManagerError, match="certificate"):
        stranger.ask(m.Claim(UUID(guest.uuid).bytes, header[:160], b"c" * 16), make(uuid4()))
    north.command("vtpm-migrate-revoke", "mallory")
    with pytest.raises(ManagerError, match="certificate"):
        stranger.claim(guest, header)
    guest.check(guest.machine)
    assert north.show(guest.name)["state"] == "running"


def test_forged_foreign_unauthorised_and_expired_claims_are_refused_and_told(pair: list[Host]) -> None:
    north, _ = pair
    guest, other, peer = Guest(north), Guest(north), Stranger(north, "peer")
    header = guest.saved()[1][1]
    denied = m.MigrationRefusal.DENIED
    peer.authorise("--leave", other.name)
    assert code(peer.claim(guest, header)) is denied, "another vTPM was allowed, not this one"
    assert code(peer.claim(other, header)) is denied, "a state of another vTPM"
    north.command("vtpm-group-add", "tenant", "--pcrs", "none")
    peer.authorise("--leave-group", "tenant")
    assert code(peer.claim(guest, header)) is denied, "another group"
    peer.authorise("--leave", guest.name, "--valid", "1s")
    time.sleep(1.2)
    assert code(peer.claim(guest, header)) is denied, "expired"
    peer.authorise("--leave-group", "default")
    for position in (*range(8, 160, 19), 159):
        forged = bytearray(header)
        forged[position] ^= 1
        assert code(peer.claim(guest, bytes(forged))) is denied, position
    assert code(peer.ask(m.Claim(UUID(guest.uuid).bytes, b"no header", b"c" * 16))) is denied
    assert code(peer.ask(m.Claim(UUID(guest.uuid).bytes, header[:160], b"short"))) is m.MigrationRefusal.MALFORMED
    told = [text for text in north.events("migration-refused") if "by peer refused" in text]
    assert len(told) >= 10
    guest.check(guest.machine)  # none of it froze anything


def test_a_claim_is_answered_to_its_claimer_alone(pair: list[Host]) -> None:
    north, _ = pair
    guest, first, second = Guest(north), Stranger(north, "first"), Stranger(north, "second")
    header = guest.saved()[1][1]
    for peer in (first, second):
        peer.authorise("--leave", guest.name)
    assert code(first.ask(m.Confirm(UUID(guest.uuid).bytes, header[48:64], b"1" * 16))) is m.MigrationRefusal.RECLAIMED
    answers: dict[str, m.MigrationReply] = {}
    threads = [
        threading.Thread(target=lambda peer=peer: answers.update({peer.name: peer.claim(guest, header, b"1" * 16)}))
        for peer in (first, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner, loser = (first, second) if isinstance(answers["first"], m.ClaimReply) else (second, first)
    assert code(answers[loser.name]) is m.MigrationRefusal.TAKEN
    key = answers[winner.name]
    assert winner.claim(guest, header, b"1" * 16) == key, "a repeated claim is answered the same"
    assert code(winner.claim(guest, header, b"2" * 16)) is m.MigrationRefusal.TAKEN, "a copy of the claimer"
    assert code(loser.claim(guest, header, b"1" * 16)) is m.MigrationRefusal.TAKEN
    vtpm, export = UUID(guest.uuid).bytes, BlobHeader.unpack(header).export
    assert code(loser.ask(m.Confirm(vtpm, export, b"1" * 16))) is m.MigrationRefusal.RECLAIMED
    assert code(winner.ask(m.Confirm(vtpm, export, b"2" * 16))) is m.MigrationRefusal.RECLAIMED
    assert north.show(guest.name)["state"] == "frozen"
    assert north.show(guest.name)["claimed_by"] == winner.name
    north.command("vtpm-migrate-revoke", winner.name)
    assert north.command("vtpm-migrate-reclaim", guest.name, "--yes", check=False).code == 4
    north.command("vtpm-migrate-release", guest.name, "--yes")
    assert north.show(guest.uuid)["migrated_to"] == winner.name


def test_a_late_word_of_an_earlier_claimer_makes_neither_two_nor_none(pair: list[Host]) -> None:
    north, _ = pair
    guest, first, second = Guest(north), Stranger(north, "gone"), Stranger(north, "third")
    vtpm, saved = UUID(guest.uuid).bytes, guest.saved()
    first.authorise("--leave", guest.name)
    assert isinstance(first.claim(guest, saved[1][1], b"1" * 16), m.ClaimReply)
    north.command("vtpm-migrate-reclaim", guest.name, "--yes", "--destination-is-gone")
    second.authorise("--leave", guest.name)
    machine = Machine(north.attach(guest.name, "again", "--frontend", "qemu")["control"])
    machine.boot()
    header = machine.save()[1][1]
    assert isinstance(second.claim(guest, header, b"2" * 16), m.ClaimReply)
    confirmation = m.Confirm(vtpm, BlobHeader.unpack(header).export, b"2" * 16)
    assert isinstance(second.ask(confirmation), m.ConfirmReply)
    late = m.Confirm(vtpm, BlobHeader.unpack(saved[1][1]).export, b"1" * 16)
    assert code(first.ask(late)) is m.MigrationRefusal.RECLAIMED, "third has it: the one that was gone has to stop"
    second.authorise("--come", guest.uuid)
    north.command("vtpm-migrate-expect", "third", guest.uuid, "--name", guest.name)
    assert isinstance(second.ask(confirmation), m.ConfirmReply), "its answer was lost: the only one there is goes on"
    north.command("vtpm-remove", guest.name, "--yes")  # the tombstone went when it was expected
    assert code(first.ask(m.Renounce(vtpm, bytes(16)))) is m.MigrationRefusal.HAS_IT, "it passed it on: no promise"
    assert isinstance(second.ask(m.Renounce(vtpm, bytes(16))), m.RenounceReply), "but to the one that it passed it to"


@pytest.mark.parametrize("asleep", [False, True])
def test_a_manager_that_was_said_to_be_gone_stops_what_was_taken_back(pair: list[Host], asleep: bool) -> None:
    north, south = pair
    guest, wire = Guest(north), Wire(f"{south.base}/gone-{asleep}.sock", f"{north.base}/migrate.sock")
    guest.allow(south, wire)
    saved, machine = guest.saved(), guest.incoming(south)
    for kind, (flags, blob) in sorted(saved.items()):
        if blob:
            machine.put(kind, flags, blob)
    north.command("vtpm-migrate-reclaim", guest.name, "--yes", "--destination-is-gone")
    assert north.show(guest.name)["state"] == "detached"
    wire.cut = asleep
    machine.call(2, (1).to_bytes(4))  # it was not gone at all
    if asleep:
        guest.check(machine)
        south.command("vtpm-hibernate", guest.name)
    wire.let_through()
    wait_for(lambda: south.state_of(guest.name) == "frozen", "it stops")
    with pytest.raises(OSError):
        machine.good(tpm.nv_read(INDEX, 8))
    control = north.attach(guest.name, "again", "--frontend", "qemu")["control"]
    source = Machine(control)
    source.boot()
    assert tpm.nv_content(source.good(tpm.nv_read(INDEX, 8))) == guest.content
    south.command("vtpm-migrate-release", guest.name, "--yes")

"""QEMU's save, restore and snapshots of a managed vTPM, spoken by hand: what comes back, and what does not."""

import array
import itertools
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import pytest
import vtpm_instance_commands as more
import vtpm_instance_rig as tpm
from blob_client import (
    GET_CAPABILITY,
    INIT,
    PERMANENT,
    SAVED,
    SET_DATAFD,
    STOP,
    VOLATILE,
    Machine,
    RefusedError,
    Saved,
)
from e2e_rig import Installation, installation, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
DIGEST = b"\x44" * 32
INDEX = 0x01500010
HASH_START, HASH_END = 6, 8
BAD_PARAMETER, FAIL, DECRYPT_ERROR, BAD_VERSION = 0x03, 0x09, 0x21, 0x2E
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def vtpms() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        yield made


@pytest.fixture(scope="module")
def stranger() -> Iterator[Installation]:
    """Another host: a manager, a store and a hardware TPM of its own."""
    with installation() as made:
        made.init()
        made.start()
        yield made


@pytest.fixture(autouse=True)
def _no_machine_is_left() -> Iterator[None]:
    yield
    while Machine.open:
        Machine.open.pop().close()


class World:
    """A vTPM of its own for each test, and whatever QEMU runs its guest."""

    def __init__(self, made: Installation, *options: str) -> None:
        self.made, self.name = made, f"web-{next(_numbers)}"
        self.uuid = made.add(self.name, *options)
        self.control = made.attach(self.name, self.name, "--frontend", "qemu")["control"]
        self.machine: Machine | None = None

    def start(self, saved: Saved | None = None) -> Machine:
        """A new QEMU, whose guest boots or goes on where it was saved."""
        self.machine = Machine(self.control)
        if saved is None:
            self.machine.boot()
        else:
            self.machine.reset(incoming=True)
            self.machine.restore(saved)
        return self.machine

    def end(self, *, politely: bool = True) -> None:
        if self.machine is not None:
            self.machine.end(politely=politely)
            self.machine = None

    def saved_at(self, pcr: int = 10) -> tuple[Saved, bytes]:
        """What QEMU saved of a guest that had just extended a PCR, and that PCR's value."""
        machine = self.start()
        machine.extend(pcr, DIGEST)
        value = machine.pcr(pcr)
        saved = machine.save()
        return saved, value

    def refuses(self, saved: Saved, result: int) -> str:
        """A new QEMU fails to restore this; return what an administrator is told."""
        generation = self.shown["generation"]
        with pytest.raises(RefusedError) as refused:
            self.start(saved)
        assert refused.value.result == result, hex(refused.value.result)
        self.end()
        said = wait_for(lambda: self.shown["restore_refused"], "the reason")
        assert self.shown["generation"] == generation, "nothing was changed"
        return str(said)

    @property
    def shown(self) -> dict[str, Any]:
        return self.made.show(self.name)

    def events(self, kind: str) -> list[str]:
        rows = self.made.command("vtpm-events", self.uuid, "--json").json
        return [row["text"] for row in rows if row["kind"] == kind]


# --- what QEMU does every day ---------------------------------------------------------------------


def test_a_saved_guest_goes_on_where_it_was_without_anybodys_permission(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, value = world.saved_at()
    generation = world.shown["generation"]
    world.end()
    assert world.shown["generation"] == generation, "QEMU's end saves nothing of a state that was taken out"
    machine = world.start(saved)
    assert machine.pcr(10) == value
    assert world.shown["generation"] == generation + 1
    assert machine.code(tpm.STARTUP_CLEAR) == 0x100, "it was not started anew"
    assert wait_for(lambda: world.events("restored"), "the event") == [
        f"state of generation {generation}, the newest, as generation {generation + 1}"
    ]
    assert world.events("exported") == [f"state of generation {generation}"]
    world.end()


def test_a_snapshot_costs_one_commit_and_the_guest_goes_on(vtpms: Installation) -> None:
    world = World(vtpms)
    _, value = world.saved_at()
    generation = world.shown["generation"]
    assert world.machine is not None
    assert world.machine.pcr(10) == value
    assert world.shown["generation"] == generation + 1, "before the first answer the snapshot is history"
    assert world.machine.pcr(10) == value
    assert world.shown["generation"] == generation + 1, "once"
    world.end()


def test_a_restart_of_the_host_side_between_save_and_restore_loses_nothing() -> None:
    with installation() as made:
        made.init()
        made.start()
        world = World(made)
        saved, value = world.saved_at()
        world.end(politely=False)
        made.restart()  # a clean stop of everything: also of an instance whose state is with QEMU
        assert world.start(saved).pcr(10) == value
        world.end()
        made.kill()
        made.start()
        world.refuses(saved, BAD_VERSION)
        assert made.command("vtpm-verify", "--all").code == 0


def test_qemu_with_loadvm_switches_the_tpm_on_before_it_puts_the_state_in(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, value = world.saved_at()
    world.end()
    machine = world.machine = Machine(world.control)
    machine.reset()  # QEMU resets the machine twice on the way, and runs nothing in between
    machine.reset()
    machine.restore(saved)
    assert machine.pcr(10) == value
    world.end()


def test_a_state_that_is_read_again_is_the_same_until_the_guest_goes_on(vtpms: Installation) -> None:
    world = World(vtpms)
    first, _ = world.saved_at()
    assert world.machine is not None
    assert world.machine.save() == first
    flags, blob = first[PERMANENT]
    assert world.machine.get(PERMANENT, 100) == (flags, blob[100:]), "pieces fit, also of an encrypted blob"
    world.machine.pcr(10)
    again = world.machine.save()
    assert again[PERMANENT][1] != first[PERMANENT][1]
    world.machine.reset()
    fresh = world.machine.save()
    assert fresh[VOLATILE][1] != again[VOLATILE][1], "switched off and on it is another state"
    world.end()
    assert world.start(fresh).code(tpm.pcr_read(10)) == 0x100, "it is the one that its firmware has not started"
    world.end()


def test_asking_for_what_there_is_not_takes_nothing_out(vtpms: Installation) -> None:
    """Else what was kept of that moment would be given out after the guest went on, as if it were the newest."""
    world = World(vtpms)
    machine = world.start()
    assert machine.get(SAVED) == (0, b"")
    machine.extend(10, DIGEST)
    value = machine.pcr(10)
    saved = machine.save()
    world.end()
    assert world.start(saved).pcr(10) == value
    world.end()


def test_nv_is_there_after_a_restore_and_no_random_number_comes_twice(vtpms: Installation) -> None:
    world = World(vtpms)
    machine = world.start()
    machine.good(tpm.nv_define(INDEX, 8))
    machine.good(tpm.nv_write(INDEX, b"precious"))
    saved = machine.save()
    drawn = machine.good(tpm.get_random(32))
    world.end()
    vtpms.command("vtpm-allow-restore", world.name)
    machine = world.start(saved)
    assert tpm.nv_content(machine.good(tpm.nv_read(INDEX, 8))) == b"precious"
    assert machine.good(tpm.get_random(32)) != drawn, "fresh entropy was stirred in"
    world.end()


def test_tpm_1_2_is_saved_and_restored_with_its_savestate(vtpms: Installation) -> None:
    """swtpm 0.7.1 answers 0x1c for ever after this (reference/swtpm-libtpms-qemu.md 4.6)."""
    world = World(vtpms, "--tpm", "1.2")
    machine = world.machine = Machine(world.control)
    machine.reset()
    machine.good(tpm.command12(0x99, b"\x00\x01"))  # TPM_Startup(ST_CLEAR)
    extended = machine.good(tpm.command12(0x14, (10).to_bytes(4) + b"\x11" * 20))[-20:]
    machine.good(tpm.command12(0x98))  # TPM_SaveState
    saved = machine.save()
    assert all(blob for _, blob in saved.values())
    world.end()
    machine = world.start(saved)
    read = tpm.command12(0x15, (10).to_bytes(4))
    assert [machine.good(read)[-20:] for _ in range(3)] == [extended] * 3
    world.end()


# --- an older state -------------------------------------------------------------------------------


def test_a_restored_state_is_not_restored_again(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, value = world.saved_at()
    world.end()
    for _ in range(2):  # a QEMU that ends before its guest's first command has used nothing up
        generation = world.shown["generation"]
        world.start(saved)
        world.end(politely=False)
        assert world.shown["generation"] == generation
    assert world.start(saved).pcr(10) == value
    world.end(politely=False)
    said = world.refuses(saved, BAD_VERSION)
    assert "rollback" in said
    assert f"vtpm-allow-restore {world.name}" in said
    assert said.endswith(world.events("restore-refused")[-1])


def test_a_snapshot_after_which_the_guest_went_on_is_refused_until_somebody_permits_it(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, value = world.saved_at()
    assert world.machine is not None
    world.machine.extend(10, DIGEST)
    world.end()
    world.refuses(saved, BAD_VERSION)
    newest = world.shown["generation"]
    assert world.shown["restore"] == "never"
    vtpms.command("vtpm-allow-restore", world.name)
    assert world.shown["restore"] == "once"
    assert world.start(saved).pcr(10) == value
    shown = world.shown
    assert (shown["generation"], shown["restore"], shown["restore_refused"]) == (newest + 1, "never", None)
    (event,) = world.events("rolled-back")
    old = int(re.search(r"state of generation (\d+)", event)[1])  # type: ignore[index]
    assert old < newest
    assert f"in place of generation {newest}, as generation {newest + 1}" in event
    assert f"as user {os.getuid()} permitted once" in event
    world.end()
    world.refuses(saved, BAD_VERSION)
    assert len(world.events("rolled-back")) == 1


def test_what_is_permitted_once_is_for_one_state(vtpms: Installation) -> None:
    world = World(vtpms)
    first, _ = world.saved_at()
    assert world.machine is not None
    world.machine.extend(10, DIGEST)
    second = world.machine.save()
    world.machine.extend(10, DIGEST)
    world.end()
    vtpms.command("vtpm-allow-restore", world.name, "--once")
    damaged = dict(first)
    damaged[VOLATILE] = (damaged[VOLATILE][0], damaged[VOLATILE][1][:-1] + b"\x00")
    world.refuses(damaged, DECRYPT_ERROR)  # it was asked for, and not put in
    world.refuses(second, BAD_VERSION)
    assert world.start(first).code(tpm.get_random(8)) == 0, "the one that was asked for may be tried again"
    world.end()
    world.refuses(second, BAD_VERSION)


def test_always_lasts_over_restarts_and_never_ends_it() -> None:
    with installation() as made:
        made.init()
        made.start()
        world = World(made)
        saved, value = world.saved_at()
        world.end()
        made.command("vtpm-allow-restore", world.name, "--once")
        made.restart()
        assert world.shown["restore"] == "never", "once is kept in memory alone"
        made.command("vtpm-allow-restore", world.name, "--always")
        for _ in range(2):
            assert world.start(saved).pcr(10) == value
            world.end()
        assert made.command("vtpm-allow-restore", world.name, "--once", check=False).code == 4
        made.kill()
        made.start()
        assert world.shown["restore"] == "always"
        assert world.start(saved).pcr(10) == value
        made.command("vtpm-allow-restore", world.name, "--never")
        world.end()
        world.refuses(saved, BAD_VERSION)
        assert [text.split(":")[1].split(",")[0].strip() for text in world.events("restore-allowed")] == [
            "once",
            "always",
        ]
        assert len(world.events("restore-forbidden")) == 1
        assert all("always permitted" in text for text in world.events("rolled-back"))


def test_the_verb_refuses_what_it_cannot_mean_and_whom_it_must(vtpms: Installation) -> None:
    world = World(vtpms)
    assert vtpms.command("vtpm-allow-restore", world.name, "--once", "--always", check=False).code == 2
    assert vtpms.command("vtpm-allow-restore", "nobody", check=False).code == 3
    assert world.shown["restore"] == "never"


def test_a_reset_takes_permissions_away_and_makes_what_was_saved_old(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, _ = world.saved_at()
    world.end()
    vtpms.command("vtpm-allow-restore", world.name, "--always")
    vtpms.command("vtpm-detach", world.name)
    vtpms.command("vtpm-reset", world.name, "--yes")
    assert world.shown["restore"] == "never"
    vtpms.attach(world.name, world.name, "--frontend", "qemu")
    world.refuses(saved, BAD_VERSION)


# --- attacks --------------------------------------------------------------------------------------


def test_a_state_of_another_vtpm_is_refused(vtpms: Installation) -> None:
    victim, thief = World(vtpms), World(vtpms)
    saved, _ = victim.saved_at()
    victim.end()
    vtpms.command("vtpm-allow-restore", thief.name, "--always")
    assert "another one" in thief.refuses(saved, FAIL)
    old = World(vtpms, "--tpm", "1.2")
    vtpms.command("vtpm-allow-restore", old.name)
    assert "another one" in old.refuses(saved, FAIL)


def test_a_state_of_another_manager_is_refused(vtpms: Installation, stranger: Installation) -> None:
    world = World(vtpms)
    saved, _ = world.saved_at()
    world.end()
    twin = World(stranger, "--uuid", world.uuid)
    stranger.command("vtpm-allow-restore", twin.name, "--always")
    said = twin.refuses(saved, FAIL)
    assert "another manager" in said or "does not wait for it" in said
    # the header says that it is this store's: then its key does not open
    store = bytes.fromhex(stranger.vtpm_manager("status", "--json").json["store"].replace("-", ""))
    forged = {kind: (flags, blob[:16] + store + blob[32:]) for kind, (flags, blob) in saved.items()}
    assert "not as it was exported" in twin.refuses(forged, FAIL)


def test_any_flipped_bit_is_refused(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, value = world.saved_at()
    world.end()
    vtpms.command("vtpm-allow-restore", world.name, "--always")
    positions = [
        0,
        8,
        10,
        12,
        14,
        16,
        32,
        48,
        64,
        72,
        80,
        112,
        159,
        160,
        164,
        168,
        180,
        700,
        len(saved[VOLATILE][1]) - 1,
    ]
    for kind in (PERMANENT, VOLATILE):
        for position in positions if kind == PERMANENT else positions[-8:]:
            flags, blob = saved[kind]
            at = position % len(blob)
            changed = blob[:at] + bytes([blob[at] ^ 0x10]) + blob[at + 1 :]
            with pytest.raises(RefusedError) as refused:
                world.start({**saved, kind: (flags, changed)})
            assert refused.value.result in (BAD_PARAMETER, FAIL, DECRYPT_ERROR, BAD_VERSION)
            world.end()
    vtpms.command("vtpm-allow-restore", world.name, "--never")
    assert world.start(saved).pcr(10) == value, "nothing of all this has changed anything"
    world.end()


def test_parts_of_two_exports_are_not_mixed(vtpms: Installation) -> None:
    world = World(vtpms)
    first, _ = world.saved_at()
    assert world.machine is not None
    world.machine.extend(10, DIGEST)
    second = world.machine.save()
    world.end()
    vtpms.command("vtpm-allow-restore", world.name, "--always")
    assert "two exports" in world.refuses({PERMANENT: first[PERMANENT], VOLATILE: second[VOLATILE]}, BAD_PARAMETER)
    assert "two exports" in world.refuses({PERMANENT: second[PERMANENT], VOLATILE: first[VOLATILE]}, BAD_PARAMETER)
    # the body of the other under the right header
    head = 180
    flags, blob = second[VOLATILE]
    mixed = {PERMANENT: second[PERMANENT], VOLATILE: (flags, blob[:head] + first[VOLATILE][1][head:])}
    world.refuses(mixed, DECRYPT_ERROR)
    as_other = {PERMANENT: second[PERMANENT], VOLATILE: second[PERMANENT]}
    assert "was put in as" in world.refuses(as_other, BAD_PARAMETER)


@pytest.mark.parametrize("part", [PERMANENT, VOLATILE])
def test_a_part_alone_is_not_used_and_the_stored_state_is_there(vtpms: Installation, part: int) -> None:
    world = World(vtpms)
    saved, value = world.saved_at()
    world.end()
    assert "lacks its" in world.refuses({part: saved[part]}, FAIL)
    assert world.start(saved).pcr(10) == value, "the refused try has used nothing up"
    world.end()


def test_what_was_put_in_and_not_used_is_not_the_next_ones(vtpms: Installation) -> None:
    """A QEMU that dies before INIT leaves nothing to the QEMU that boots the guest next."""
    world = World(vtpms)
    saved, _ = world.saved_at()
    world.end()
    machine = Machine(world.control)
    machine.reset(incoming=True)
    for kind in (PERMANENT, VOLATILE):
        machine.put(kind, *saved[kind])
    machine.end(politely=False)
    machine = world.start()
    assert machine.pcr(10) == bytes(32), "it booted"
    world.end()
    world.refuses(saved, BAD_VERSION)


def test_a_state_of_a_removed_vtpm_brings_nothing_back(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, _ = world.saved_at()
    world.end()
    vtpms.command("vtpm-allow-restore", world.name)
    vtpms.command("vtpm-detach", world.name)
    vtpms.command("vtpm-remove", world.name, "--yes")
    assert vtpms.command("vtpm-allow-restore", world.uuid, check=False).code == 3
    assert vtpms.command("vtpm-add", "--uuid", world.uuid, check=False).code == 4, "its UUID is not free"
    other = World(vtpms)
    assert "another one" in other.refuses(saved, FAIL)


def test_no_bytes_of_the_state_are_in_clear_in_what_qemu_keeps(vtpms: Installation) -> None:
    world = World(vtpms)
    machine = world.start()
    secret = os.urandom(24)
    machine.good(tpm.nv_define(INDEX, 24))
    machine.good(tpm.nv_write(INDEX, secret))
    saved = machine.save()
    kept = b"".join(blob for _, blob in saved.values())
    assert len(kept) > 5000
    assert not any(secret[start : start + 6] in kept for start in range(0, 18, 3))
    world.end()


# --- what happens between a save and its use ------------------------------------------------------


def _start_12(machine: Machine) -> None:
    machine.good(tpm.command12(0x99, b"\x00\x01"))  # TPM_Startup(ST_CLEAR), which stores nothing


def test_a_restored_state_is_used_by_whatever_comes_first_also_after_a_reset(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, _ = world.saved_at()
    world.end()
    machine = world.start(saved)
    generation = world.shown["generation"]
    machine.reset()  # drops what was restored
    machine.call(HASH_START)
    machine.call(HASH_END)
    assert world.shown["generation"] == generation + 1
    world.end()
    world.refuses(saved, BAD_VERSION)


def test_a_tpm_1_2_that_booted_makes_what_was_saved_old_though_booting_stores_nothing(vtpms: Installation) -> None:
    world = World(vtpms, "--tpm", "1.2")
    machine = world.machine = Machine(world.control)
    machine.reset()
    _start_12(machine)
    older = machine.save()
    assert machine.code(tpm.command12(0x15, (10).to_bytes(4))) == 0  # the guest goes on
    newest = machine.save()
    vtpms.command("vtpm-allow-restore", world.name)
    machine.call(STOP)
    for kind in (PERMANENT, VOLATILE):
        machine.put(kind, *older[kind])
    vtpms.command("vtpm-allow-restore", world.name, "--never")
    with pytest.raises(RefusedError):
        machine.call(INIT, bytes(4))
    world.end()
    machine = world.machine = Machine(world.control)
    machine.reset()
    _start_12(machine)
    saved = machine.save()
    world.end()
    world.refuses(newest, BAD_VERSION)
    machine = world.start(saved)
    machine.reset()
    _start_12(machine)
    world.end()
    world.refuses(saved, BAD_VERSION)


def test_what_a_tpm_stores_by_itself_disturbs_no_save_and_uses_no_restored_state(vtpms: Installation) -> None:
    """With any command libtpms may store its clock, every 70 minutes, or that a try at a password is forgotten."""
    world = World(vtpms)
    machine = world.start()
    limits = struct.pack(">III", 10, 1, 1)  # tries, seconds until one is forgotten, until the lockout is
    machine.good(more.authorised(0x13A, (0x4000000A).to_bytes(4), limits))  # DictionaryAttackParameters
    public = struct.pack(">IHIHH", INDEX, 0x000B, 0x00040004, 0, 8)
    machine.good(more.authorised(0x12A, (0x40000001).to_bytes(4), more.sized(b"x") + more.sized(public)))

    def fail() -> None:
        wrong = more.authorised(0x137, INDEX.to_bytes(4) * 2, more.sized(b"\1" * 8) + bytes(2))
        assert {machine.code(wrong), machine.code(wrong)} <= {0x98E, 0x922}

    fail()
    generation = world.shown["generation"]
    time.sleep(2.5)
    machine.save()
    assert world.shown["generation"] == generation + 1, "this is what the test is about"
    fail()
    saved = machine.save()
    generation = world.shown["generation"]
    world.end()
    time.sleep(2.5)
    for _ in range(2):
        machine = world.start(saved)
        world.end(politely=False)
    assert world.shown["generation"] == generation
    world.start(saved)
    world.end()


def test_a_platform_reset_by_the_manager_drops_nothing_that_was_put_in(vtpms: Installation) -> None:
    world = World(vtpms)
    saved, value = world.saved_at()
    world.end()
    machine = world.machine = Machine(world.control)
    machine.reset(incoming=True)
    for kind, (flags, blob) in saved.items():
        if blob:
            machine.put(kind, flags, blob)
    vtpms.command("vtpm-reset-platform", world.name)
    machine.call(INIT, bytes(4))
    assert machine.pcr(10) == value
    world.end()


def test_the_end_of_one_qemu_is_not_that_of_the_next(vtpms: Installation) -> None:
    world = World(vtpms)
    world.start()
    ours, theirs = socket.socketpair()
    with socket.socket(socket.AF_UNIX) as control, ours:
        for each in (control, ours):
            each.settimeout(60)
        control.connect(world.control)
        control.sendall(struct.pack(">I", GET_CAPABILITY))
        assert control.recv(8)[:4] == bytes(4)
        pid = world.shown["pid"]
        os.kill(pid, signal.SIGSTOP)  # so that it hears of both at once
        try:
            world.end(politely=False)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [theirs.fileno()]))]
            with theirs:
                control.sendmsg([struct.pack(">I", SET_DATAFD)], rights)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert control.recv(4) == bytes(4)
        control.sendall(struct.pack(">II", INIT, 0))
        assert control.recv(4) == bytes(4)
        ours.sendall(tpm.STARTUP_CLEAR)
        assert tpm.rc(ours.recv(100)) == 0

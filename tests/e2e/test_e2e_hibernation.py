"""Hibernation as guests and administrators meet it: nothing is lost, nothing is used twice, every verb is defined."""

import os
import shutil
import signal
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, alive, installation, wait_for
from tpm2_pytss import ESAPI, ESYS_TR, TCTILdr
from tpm2_pytss.types import TPML_PCR_SELECTION

from frontend_backend.front import RingFrontEnd
from frontend_backend.tpmhdr import command
from manager.client import request

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
FAILURE = 0x101
READ_CLOCK = bytes.fromhex("80010000000a00000181")


@pytest.fixture(scope="module")
def shared() -> Iterator[Installation]:
    """One installation for tests that leave it running."""
    with installation() as made:
        made.init()
        made.start()
        yield made


@pytest.fixture(scope="module")
def vtpms() -> Iterator[Installation]:
    """One installation for tests that stop and start it."""
    with installation() as made:
        made.init()
        made.start()
        yield made


def asleep(made: Installation, name: str) -> bool:
    return bool(made.show(name)["state"] == "hibernated")


def hibernate(made: Installation, name: str) -> dict[str, Any]:
    """Hibernate; its guest must be quiet."""
    (shown,) = request(str(made.runtime / "admin.sock"), "hibernate", {"vtpm": name})  # what the command does, quicker
    assert (shown["state"], shown["pid"]) == ("hibernated", None)
    assert shown["hibernated_since"] is not None
    return shown


def events(made: Installation, name: str) -> list[str]:
    return [row["kind"] for row in made.command("vtpm-events", name, "--json").json]


def clock(guest: Guest) -> tuple[int, int, int, int]:
    """TPMS_TIME_INFO: time and clock in milliseconds, resetCount, restartCount."""
    time_, clock_, resets, restarts, _safe = struct.unpack_from(">QQIIB", guest.good(READ_CLOCK), 10)
    return time_, clock_, resets, restarts


def test_sessions_objects_pcrs_nv_and_connections_survive(shared: Installation, tmp_path: Path) -> None:
    shared.add("all")
    shown = shared.attach("all")
    tcti = shown["tcti"]
    guest = Guest(shown["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, b"in-nvram")
    guest.extend(7, b"\x77" * 32)
    value = guest.pcr(7)
    session = guest.good(_start_session())[10:14]
    handle = guest.good(_create_primary_ecc())[10:14]
    public = guest.good(_read_public(handle))
    context = shared.tool(tcti, "tpm2_createprimary", "-Q", "-C", "o", "-c", str(tmp_path / "key.ctx"))
    assert context.code == 0
    before = clock(guest)
    for turn in range(5):
        pid = shared.show("all")["pid"]
        hibernate(shared, "all")
        wait_for(lambda pid=pid: not alive(pid), "the end of its process")
        assert guest.pcr(7) == value, "over the same connection"
        assert guest.good(_read_public(handle)) == public, f"the transient object, turn {turn}"
        assert guest.code(_policy_restart(session)) == 0, "the open session"
        assert guest.read(INDEX, 8) == b"in-nvram"
        now = clock(guest)
        assert now[:2] >= before[:2], "time does not run backwards"
        assert now[2:] == before[2:], "no reset and no restart is counted"
        before = now
    hibernate(shared, "all")
    shared.tool(tcti, "tpm2_flushcontext", "-t")
    done = shared.tool(tcti, "tpm2_create", "-Q", "-C", str(tmp_path / "key.ctx"), "-u", str(tmp_path / "u"), "-r", "r")
    assert done.code == 0, "a context that was saved before"
    wait_for(
        lambda: {"hibernated", "resumed"} <= set(events(shared, "all")), "the events, which are kept once a second"
    )
    guest.close()


def _start_session() -> bytes:
    """TPM2_StartAuthSession: a policy session, not salted, not bound."""
    null = 0x40000007
    return command(0x176, struct.pack(">II", null, null) + tpm.sized(bytes(16)) + struct.pack(">HBHH", 0, 1, 0x10, 0xB))


def _policy_restart(session: bytes) -> bytes:
    return command(0x180, session)


def _create_primary_ecc() -> bytes:
    public = struct.pack(">HHIH", 0x23, 0xB, 0x00040472, 0) + struct.pack(">HHHH", 0x10, 0x10, 3, 0x10) + bytes(4)
    return tpm.authorised(0x131, struct.pack(">I", 0x40000001), tpm.sized(bytes(4)) + tpm.sized(public) + bytes(6))


def _read_public(handle: bytes) -> bytes:
    return command(0x173, handle)


def test_fifty_resumes_draw_fifty_different_numbers(shared: Installation) -> None:
    shared.add("dice")
    guest = Guest(shared.attach("dice")["endpoint"])
    drawn = set()
    for _ in range(50):
        hibernate(shared, "dice")
        drawn.add(guest.good(tpm.get_random(16))[-16:])
    assert len(drawn) == 50
    guest.close()


def test_an_idle_vtpm_goes_to_sleep_by_itself_and_a_busy_one_does_not(shared: Installation) -> None:
    for name in ("idle", "busy", "never"):
        shared.add(name)
    busy = Guest(shared.attach("busy", "guest", "--hibernate", "5")["endpoint"])
    done = threading.Event()

    def work() -> None:
        while not done.wait(0.05):
            busy.pcr(1)

    worker = threading.Thread(target=work)
    worker.start()
    pid = shared.show("busy")["pid"]
    idle = Guest(shared.attach("idle", "guest", "--hibernate", "1")["endpoint"])
    shared.attach("never", "guest", "--hibernate", "never")
    idle.extend(3, b"\x33" * 32)
    value = idle.pcr(3)
    wait_for(lambda: asleep(shared, "idle"), "the idle one to sleep")
    time.sleep(6)
    assert shared.show("busy")["pid"] == pid, "one that works is left alone"
    done.set()
    worker.join()
    status = shared.vtpm_manager("status", "--json").json
    assert status["hibernated"] >= 1
    assert status["hibernated_bytes_freed"] > 0
    wait_for(lambda: asleep(shared, "busy"), "the other one to sleep, once it has nothing to do")
    assert shared.show("never")["state"] == "running"
    assert idle.pcr(3) == value
    assert (shared.show("idle")["hibernate_after"], shared.show("never")["hibernate_after"]) == (1.0, 0.0)
    for guest in (idle, busy):
        guest.close()
    for name in ("idle", "busy"):
        shared.command("vtpm-detach", name)


def test_a_guest_that_hangs_up_wakes_nobody_and_the_next_one_does(shared: Installation) -> None:
    shared.add("quiet")
    guest = Guest(shared.attach("quiet")["endpoint"])
    guest.pcr(0)
    hibernate(shared, "quiet")
    guest.close()
    time.sleep(0.3)
    assert asleep(shared, "quiet"), "nothing was left unread, so nobody is woken"
    assert len(guest.pcr(0)) == 32, "a new connection wakes it"
    assert shared.show("quiet")["state"] == "running"
    guest.close()


def test_a_program_that_keeps_its_tss_context_open_notices_nothing(shared: Installation) -> None:
    shared.add("tss")
    shown = shared.attach("tss")
    with TCTILdr("swtpm", f"path={shown['endpoint']}") as tcti, ESAPI(tcti) as esapi:
        esapi.pcr_event(ESYS_TR.PCR16, b"before")
        _, _, before = esapi.pcr_read(TPML_PCR_SELECTION.parse("sha256:16"))
        for _ in range(3):
            hibernate(shared, "tss")
            _, _, after = esapi.pcr_read(TPML_PCR_SELECTION.parse("sha256:16"))
            assert bytes(after[0]) == bytes(before[0]) != bytes(32)


def test_a_ring_is_kept_open(shared: Installation) -> None:
    shared.add("ringed")
    shown = shared.attach("ringed", "guest", "--frontend", "ring")
    with RingFrontEnd.connect(shown["endpoint"]) as front:
        assert tpm.rc(front.transact(tpm.pcr_extend(9), timeout=30)) == 0
        value = front.transact(tpm.pcr_read(9), timeout=30)
        for _ in range(5):
            hibernate(shared, "ringed")
            assert front.transact(tpm.pcr_read(9), timeout=30) == value
    hibernate_when_quiet(shared, "ringed")
    with RingFrontEnd.connect(shown["endpoint"]) as front:
        assert front.transact(tpm.pcr_read(9), timeout=30) == value, "a new ring wakes it, too"


def hibernate_when_quiet(made: Installation, name: str) -> None:
    """Hibernate one whose guest has just hung up, which its instance may not have noticed yet."""
    wait_for(lambda: made.command("vtpm-hibernate", name, check=False).code == 0, f"{name} to sleep")


def test_tpm_12_goes_on_where_it_was(shared: Installation) -> None:
    shared.add("old", "--tpm", "1.2")
    guest = Guest(shared.attach("old")["endpoint"])
    guest.good(tpm.command12(0x14, struct.pack(">I", 16) + b"\x11" * 20))
    read = tpm.command12(0x15, struct.pack(">I", 16))
    value = guest.good(read)
    for save_state in (False, True):
        if save_state:
            guest.good(tpm.command12(0x98))
        hibernate(shared, "old")
        assert guest.good(read) == value
    guest.close()


def test_the_dictionary_attack_timer_goes_on_while_it_sleeps(shared: Installation) -> None:
    shared.add("lockout")
    shown = shared.attach("lockout")
    tcti = shown["tcti"]
    shared.tool(tcti, "tpm2_dictionarylockout", "-s", "-n", "3", "-t", "1", "-l", "1")
    shared.tool(tcti, "tpm2_nvdefine", "-Q", "0x1500030", "-s", "4", "-a", "authread|authwrite", "-p", "right")
    assert shared.tool(tcti, "tpm2_nvread", "0x1500030", "-s", "4", "-P", "wrong", check=False).code != 0

    def failed_tries() -> int:
        text = shared.tool(tcti, "tpm2_getcap", "properties-variable").out
        return int(next(line.split(":")[1] for line in text.splitlines() if "LOCKOUT_COUNTER" in line), 16)

    assert failed_tries() == 1
    hibernate_when_quiet(shared, "lockout")
    time.sleep(2.5)
    assert failed_tries() == 0, "a second of recovery for each failed try, asleep or not"


def test_reset_detach_and_attach_of_one_that_sleeps(shared: Installation) -> None:
    shared.add("verbs")
    guest = Guest(shared.attach("verbs")["endpoint"])
    guest.extend(5, b"\x55" * 32)
    resets = clock(guest)[2:]
    hibernate(shared, "verbs")
    assert shared.command("vtpm-hibernate", "verbs").code == 0, "it sleeps already"
    assert shared.command("vtpm-attach", "verbs", "other", check=False).code == 4
    assert shared.command("vtpm-remove", "verbs", "--yes", check=False).code == 4
    assert shared.command("vtpm-reset", "verbs", "--yes", check=False).code == 4
    shared.command("vtpm-reset-platform", "verbs")
    assert guest.pcr(5) == bytes(32), "a platform reset"
    assert clock(guest)[2:] != resets, "which is counted as one"
    guest.extend(5, b"\x66" * 32)
    value = guest.pcr(5)
    hibernate(shared, "verbs")
    shared.command("vtpm-detach", "verbs")
    shown = shared.show("verbs")
    assert (shown["state"], shown["hibernated_since"]) == ("detached", None)
    assert any("guest guest, cleanly" in row["text"] for row in shared.command("vtpm-events", "verbs", "--json").json)
    guest.close()
    guest = Guest(shared.attach("verbs", "guest", "--startup", "state")["endpoint"])
    assert guest.pcr(5) == value, "it was woken for a clean stop, which can be resumed"
    guest.close()
    hibernate_when_quiet(shared, "verbs")
    shared.command("vtpm-detach", "verbs")
    shared.command("vtpm-remove", "verbs", "--yes")


def test_init_on_the_control_channel_wakes_it_and_resets_it(shared: Installation) -> None:
    shared.add("init")
    shown = shared.attach("init")
    guest = Guest(shown["endpoint"])
    guest.extend(5, b"\x55" * 32)
    hibernate(shared, "init")
    with tpm.connect(Path(shown["control"])) as control:
        control.sendall(struct.pack(">II", 2, 0))
        assert tpm.receive_exactly(control, 4) == bytes(4)
    assert guest.pcr(5) == bytes(32)
    guest.close()


def test_a_quote_that_cannot_be_made_wakes_nobody(shared: Installation) -> None:
    shared.add("unquoted")
    shared.attach("unquoted")
    shared.command("vtpm-hibernate", "unquoted")
    refused = shared.command("vtpm-quote", "unquoted", "--nonce", "5eed", check=False)
    assert (refused.code, "vtpm-group-enroll" in refused.err) == (4, True)
    assert shared.show("unquoted")["state"] == "hibernated"


def test_what_cannot_be_hibernated_says_why(shared: Installation) -> None:
    shared.add("cannot")
    assert shared.command("vtpm-hibernate", "nobody", check=False).code == 3
    assert shared.command("vtpm-hibernate", "cannot", check=False).code == 4
    assert shared.command("vtpm-attach", "cannot", "guest", "--hibernate", "soon", check=False).code == 2
    shown = shared.attach("cannot")
    guests = [Guest(shown["endpoint"]) for _ in range(4)]
    for guest in guests:
        guest.pcr(0)
    refused = shared.command("vtpm-hibernate", "cannot", check=False)
    assert (refused.code, "4 connections" in refused.err) == (8, True)
    for guest in guests[1:]:
        guest.close()
    assert guests[0].sock is not None
    guests[0].sock.sendall(tpm.pcr_read(0)[:7])
    wait_for(lambda: "middle of a request" in shared.command("vtpm-hibernate", "cannot", check=False).err, "its reason")
    guests[0].sock.sendall(tpm.pcr_read(0)[7:])
    assert tpm.rc(tpm.receive_response(guests[0].sock)) == 0, "the command was waited for"
    os.kill(shared.show("cannot")["pid"], signal.SIGKILL)
    wait_for(lambda: shared.show("cannot")["state"] == "needs-reset", "the crash")
    refused = shared.command("vtpm-hibernate", "cannot", check=False)
    assert (refused.code, "platform reset" in refused.err) == (4, True)
    guests[0].close()


# --- restarts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_command_waits_for_the_next_manager(vtpms: Installation, number: signal.Signals) -> None:
    web, sleeper = f"web-{number}", f"other-{number}"
    vtpms.add(web)
    vtpms.add(sleeper)
    guest, other = Guest(vtpms.attach(web)["endpoint"]), Guest(vtpms.attach(sleeper)["endpoint"])
    guest.extend(4, b"\x44" * 32)
    value = guest.pcr(4)
    other.pcr(0)
    hibernate(vtpms, web)
    hibernate(vtpms, sleeper)
    since = vtpms.show(sleeper)["hibernated_since"]
    vtpms.stop(number)
    assert guest.sock is not None
    guest.sock.sendall(tpm.pcr_read(4))
    vtpms.start()
    assert tpm.receive_response(guest.sock)[-32:] == value, "it was sent while there was no manager"
    shown = vtpms.show(sleeper)
    assert (shown["state"], shown["hibernated_since"][:16]) == ("hibernated", since[:16])
    other.pcr(0)
    guest.close()
    other.close()


def test_a_clean_stop_of_everything_leaves_it_asleep_and_its_state_whole(vtpms: Installation) -> None:
    vtpms.add("stopped")
    guest = Guest(vtpms.attach("stopped")["endpoint"])
    guest.extend(4, b"\x44" * 32)
    value = guest.pcr(4)
    before = clock(guest)
    hibernate(vtpms, "stopped")
    guest.close()
    vtpms.restart()
    assert vtpms.show("stopped")["state"] == "hibernated"
    assert guest.pcr(4) == value
    assert clock(guest)[2:] == before[2:], "no Shutdown, no Startup"
    guest.close()


def test_without_its_keeper_it_sleeps_on_and_loses_its_connections_only(vtpms: Installation) -> None:
    vtpms.add("keeperless")
    guest = Guest(vtpms.attach("keeperless")["endpoint"])
    guest.extend(4, b"\x44" * 32)
    value = guest.pcr(4)
    hibernate(vtpms, "keeperless")
    keeper = vtpms.vtpm_manager("status", "--json").json["keeper_pid"]
    os.kill(keeper, signal.SIGKILL)
    guest.close()

    def answers() -> bool:
        try:
            return guest.pcr(4) == value
        except OSError:
            return False

    wait_for(answers, "new sockets")
    assert vtpms.show("keeperless")["state"] == "running"
    guest.close()


def test_everything_killed_while_it_sleeps(vtpms: Installation) -> None:
    vtpms.add("powerless")
    guest = Guest(vtpms.attach("powerless")["endpoint"])
    guest.extend(4, b"\x44" * 32)
    value = guest.pcr(4)
    hibernate(vtpms, "powerless")
    guest.close()
    vtpms.kill()
    for pid in vtpms.processes():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not vtpms.processes(), "everything to end")
    vtpms.start()
    assert vtpms.show("powerless")["state"] == "hibernated"
    assert guest.pcr(4) == value
    guest.close()


def test_one_whose_image_is_away_says_so_and_its_guest_waits(vtpms: Installation) -> None:
    vtpms.add("away")
    guest = Guest(vtpms.attach("away")["endpoint"])
    guest.extend(4, b"\x44" * 32)
    value = guest.pcr(4)
    image = Path(hibernate(vtpms, "away")["state_image"])
    elsewhere = vtpms.base / "away.img"
    image.rename(elsewhere)
    assert guest.sock is not None
    guest.sock.sendall(tpm.pcr_read(4))
    wait_for(lambda: "is missing" in (vtpms.show("away")["reason"] or ""), "the reason")
    assert vtpms.show("away")["state"] == "hibernated"
    elsewhere.rename(image)
    assert tpm.receive_response(guest.sock)[-32:] == value, "nothing was used up in the meantime"
    assert vtpms.show("away")["reason"] is None
    guest.close()


def test_one_whose_row_was_edited_is_not_woken_and_the_manager_goes_on(vtpms: Installation) -> None:
    vtpms.add("edited")
    guest = Guest(vtpms.attach("edited", "guest-of-edited")["endpoint"])
    guest.pcr(4)
    hibernate(vtpms, "edited")

    def rename(old: str, new: str) -> None:
        with closing(sqlite3.connect(vtpms.state / "catalogue.sqlite", timeout=10)) as database, database:
            database.execute("update attachments set guest = ? where guest = ?", (new, old))

    rename("guest-of-edited", "thief")
    assert guest.sock is not None
    guest.sock.sendall(tpm.pcr_read(4))
    wait_for(lambda: "the catalogue cannot be read" in vtpms.log.read_text(), "the refusal")
    assert vtpms.vtpm_manager("status", "--json").json["hibernated"] >= 1, "nothing was started"
    rename("thief", "guest-of-edited")
    guest.close()
    vtpms.command("vtpm-detach", "edited")


# --- once -------------------------------------------------------------------------------------------


def test_a_volatile_state_that_was_resumed_is_not_resumed_again(vtpms: Installation) -> None:
    vtpms.add("once")
    guest = Guest(vtpms.attach("once")["endpoint"])
    guest.define(INDEX, 4)
    guest.write(INDEX, b"kept")
    guest.extend(4, b"\x44" * 32)
    shown = hibernate(vtpms, "once")
    image = Path(shown["state_image"])
    copy = vtpms.base / "copy.img"
    shutil.copy(image, copy)
    guest.pcr(4)
    os.kill(vtpms.show("once")["pid"], signal.SIGKILL)  # nothing was saved since: the image is the very same
    guest.close()
    wait_for(lambda: vtpms.show("once")["state"] == "needs-reset", "the crash")
    assert guest.code(tpm.pcr_read(4)) == FAILURE
    guest.close()
    vtpms.stop()
    shutil.copy(copy, image)
    vtpms.start()
    wait_for(lambda: vtpms.show("once")["state"] == "needs-reset", "its instance")
    assert guest.code(tpm.pcr_read(4)) == FAILURE, "the record says that it was used"
    vtpms.command("vtpm-reset-platform", "once")
    assert guest.pcr(4) == bytes(32)
    assert guest.read(INDEX, 4) == b"kept"
    guest.write(INDEX, b"more")
    guest.close()
    vtpms.stop()
    shutil.copy(copy, image)
    vtpms.start()
    wait_for(lambda: vtpms.show("once")["state"] == "quarantined", "the old image to be refused")
    assert image.read_bytes() == copy.read_bytes(), "not a byte is changed"


def test_an_attachment_keeps_its_time_over_a_restart(vtpms: Installation) -> None:
    vtpms.add("timed")
    vtpms.attach("timed", "guest", "--hibernate", "7200")
    vtpms.restart()
    assert vtpms.show("timed")["hibernate_after"] == 7200.0
    listed = {row["name"]: row["hibernate_after"] for row in vtpms.command("vtpm-list", "--json").json}
    assert (listed["timed"], listed["once"]) == (7200.0, 600.0)


def test_one_that_sleeps_is_detached_cleanly_though_there_is_no_room_to_wake_it(vtpms: Installation) -> None:
    vtpms.add("sleeps")
    vtpms.add("runs")
    guest = Guest(vtpms.attach("sleeps")["endpoint"])
    guest.extend(5, b"\x55" * 32)
    value = guest.pcr(5)
    hibernate(vtpms, "sleeps")
    guest.close()
    vtpms.attach("runs")
    most = vtpms.vtpm_manager("status", "--json").json["running"]
    vtpms.configure("running", most)
    vtpms.stop(signal.SIGKILL)
    vtpms.start()
    assert vtpms.command("vtpm-reset-platform", "sleeps", check=False).code == 8, "there is no room"
    vtpms.command("vtpm-detach", "sleeps")
    assert any("guest guest, cleanly" in row["text"] for row in vtpms.command("vtpm-events", "sleeps", "--json").json)
    vtpms.command("vtpm-detach", "runs")
    guest = Guest(vtpms.attach("sleeps", "guest", "--startup", "state")["endpoint"])
    assert guest.pcr(5) == value
    guest.close()
    vtpms.configure("running", 0)

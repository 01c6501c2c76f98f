"""What dies, and what the guest sees of it: every acknowledged write is there, and PCRs cannot be forged."""

import os
import signal
import threading
import time

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, alive, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
FAILURE = 0x101


def write_until_it_dies(guest: Guest, first: int, count: int, written: list[int]) -> None:
    """Write the numbers first.. into NV, one command each; `written` gets each that was acknowledged."""
    for number in range(first, first + count):
        try:
            answer = guest.transmit(tpm.nv_write(INDEX, number.to_bytes(8, "big")))
        except OSError:
            return
        if int.from_bytes(answer[6:10], "big") != 0:
            return
        written.append(number)


def test_kill_9_of_the_instance_loses_no_acknowledged_write_and_forges_no_pcr(vtpms: Installation) -> None:
    vtpms.add("web")
    shown = vtpms.attach("web")
    guest = Guest(shown["endpoint"])
    guest.define(INDEX, 8)
    written = [0]
    guest.write(INDEX, bytes(8))
    for turn in range(20):
        pid = vtpms.show("web")["pid"]
        guest.extend(4, b"\x44" * 32)
        writer = threading.Thread(target=write_until_it_dies, args=(guest, written[-1] + 1, 200, written))
        writer.start()
        time.sleep(0.002 + 0.003 * (turn % 7))
        os.kill(pid, signal.SIGKILL)
        writer.join()
        guest.close()
        wait_for(
            lambda old=pid: vtpms.show("web")["state"] == "needs-reset" and vtpms.show("web")["pid"] != old, "restart"
        )
        assert guest.code(tpm.pcr_read(4)) == FAILURE, "no PCR value before a platform reset"
        assert guest.code(tpm.pcr_extend(4, b"\x44" * 32)) == FAILURE
        assert guest.code(tpm.STARTUP_CLEAR) == FAILURE, "a guest cannot start it up by itself"
        vtpms.command("vtpm-reset-platform", "web")
        value = int.from_bytes(guest.read(INDEX, 8), "big")
        assert value in (written[-1], written[-1] + 1), f"turn {turn}: {written[-1]} was acknowledged, {value} is there"
        written.append(value)
    guest.close()


def test_kill_9_of_the_manager_is_a_pause_for_the_guest(vtpms: Installation) -> None:
    vtpms.add("web")
    shown = vtpms.attach("web")
    guest = Guest(shown["endpoint"])
    guest.define(INDEX, 8)
    written: list[int] = []
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            guest.write(INDEX, number.to_bytes(8, "big"))
            written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(5):
        seen = len(written)
        wait_for(lambda floor=seen: len(written) > floor + 20, "writes")
        vtpms.kill()
        assert alive(shown["pid"])
        vtpms.start()
    seen = len(written)
    wait_for(lambda: len(written) > seen + 20, "writes after the last restart")
    stop.set()
    writer.join()
    assert vtpms.show("web")["pid"] == shown["pid"], "the same instance all the time"
    assert int.from_bytes(guest.read(INDEX, 8), "big") == written[-1]
    guest.close()
    vtpms.restart()
    assert int.from_bytes(guest.read(INDEX, 8), "big") == written[-1]
    guest.close()


def test_kill_9_of_manager_keeper_and_instances_keeps_every_acknowledged_write(vtpms: Installation) -> None:
    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, b"acknowle")
    guest.extend(0, b"\x55" * 32)
    guest.close()
    vtpms.kill()
    for pid in vtpms.processes():
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not vtpms.processes(), "everything to end")
    vtpms.start()
    wait_for(lambda: vtpms.show("web")["state"] == "needs-reset", "the instance")
    assert guest.code(tpm.pcr_read(0)) == FAILURE
    vtpms.command("vtpm-reset-platform", "web")
    assert guest.read(INDEX, 8) == b"acknowle"
    guest.close()


def test_without_its_keeper_an_instance_ends_cleanly_and_comes_back_as_it_was(vtpms: Installation) -> None:
    vtpms.add("web")
    shown = vtpms.attach("web")
    guest = Guest(shown["endpoint"])
    guest.define(INDEX, 4)
    guest.write(INDEX, b"kept")
    guest.extend(9, b"\x66" * 32)
    value = guest.pcr(9)
    guest.close()
    keeper = vtpms.vtpm_manager("status", "--json").json["keeper_pid"]
    os.kill(keeper, signal.SIGKILL)
    wait_for(lambda: vtpms.show("web")["pid"] not in (None, shown["pid"]), "another instance")
    wait_for(lambda: vtpms.show("web")["state"] == "running", "it to run")
    assert guest.read(INDEX, 4) == b"kept"
    assert guest.pcr(9) == value, "it was stopped cleanly, so its PCRs stand"
    guest.close()
    assert vtpms.vtpm_manager("status", "--json").json["keeper_pid"] != keeper
    vtpms.add("second")
    vtpms.attach("second")


def test_two_managers_cannot_have_one_store(vtpms: Installation) -> None:
    assert vtpms.try_start() == 8
    assert "another vtpm-manager" in vtpms.refusal
    assert vtpms.command("vtpm-list").code == 0, "the first one goes on"


def test_an_instance_that_keeps_crashing_is_left_down_and_loses_nothing(vtpms: Installation) -> None:
    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.define(INDEX, 4)
    guest.write(INDEX, b"kept")
    guest.close()
    for _ in range(6):
        pid = wait_for(lambda: vtpms.show("web")["pid"], "an instance")
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda old=pid: vtpms.show("web")["pid"] != old, "its end")
    wait_for(lambda: "crashed too often" in (vtpms.show("web")["reason"] or ""), "the manager to give up")
    assert vtpms.show("web")["state"] == "down"
    assert "crashed too often" in vtpms.log.read_text()
    vtpms.command("vtpm-reset-platform", "web")
    assert vtpms.show("web")["reason"] is None
    assert guest.read(INDEX, 4) == b"kept"
    guest.close()


def test_sockets_of_a_stopped_installation_do_not_keep_the_next_from_starting(vtpms: Installation) -> None:
    vtpms.add("web")
    shown = vtpms.attach("web")
    vtpms.stop()
    vtpms.start()
    guest = Guest(shown["endpoint"])
    guest.good(tpm.get_random(4))
    guest.close()

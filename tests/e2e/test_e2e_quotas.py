"""Quotas of one vTPM, as a user sets and sees them: a flood costs its own vTPM, and what can wait is not refused."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, installation, wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

INDEX = 0x1500016
NV_SPACE = 0x14B
TPM12_NOSPACE = 0x11
RATE = 20
NUMBERS = count()


@pytest.fixture(scope="module")
def vtpms() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        yield made


@pytest.fixture
def web(vtpms: Installation) -> str:
    name = f"web-{next(NUMBERS)}"
    vtpms.add(name)
    return name


class Flood:
    """Sends one command after the other until told to stop, and counts the answers."""

    def __init__(self, endpoint: str, command: bytes) -> None:
        self.guest, self.answers, self.codes = Guest(endpoint), 0, set[int]()
        self._command, self._stop = command, threading.Event()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def _work(self) -> None:
        while not self._stop.is_set():
            self.codes.add(self.guest.code(self._command))
            self.answers += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.guest.close()


def quotas(shown: dict[str, Any]) -> tuple[Any, ...]:
    return shown["commands_per_second"], shown["saves_per_second"], shown["nv_bytes"]


def test_a_flooding_guest_gets_its_share_and_its_neighbour_is_not_held_up(vtpms: Installation, web: str) -> None:
    vtpms.add("neighbour")
    started = time.monotonic()
    shown = vtpms.attach(web, "guest", "--commands-per-second", str(RATE))
    assert quotas(shown) == (RATE, None, None)
    floods = [Flood(vtpms.attach("neighbour")["endpoint"], tpm.get_random(8))]
    floods += [Flood(shown["endpoint"], tpm.get_random(8)) for _ in range(3)]  # connections do not multiply it
    wait_for(lambda: sum(flood.answers for flood in floods[1:]) > 4 * RATE, "the flood to be held back")
    for flood in floods:
        flood.stop()
    most = RATE + RATE * (time.monotonic() - started)
    mine = sum(flood.answers for flood in floods[1:])
    assert mine <= most + 3
    assert floods[0].answers > 3 * mine
    assert floods[0].codes == floods[1].codes == {0}, "answers are late, not refusals"


def test_control_commands_are_answered_while_commands_wait(vtpms: Installation, web: str) -> None:
    shown = vtpms.attach(web, "guest", "--commands-per-second", "1")
    flood = Flood(shown["endpoint"], tpm.get_random(8))
    wait_for(lambda: flood.answers > 1, "the bucket to be empty")
    with socket.socket(socket.AF_UNIX) as control:
        control.settimeout(30)
        control.connect(shown["control"])
        before = flood.answers
        for _ in range(100):
            control.sendall(struct.pack(">I", 1))  # CMD_GET_CAPABILITY
            assert control.recv(64)
        assert flood.answers - before < 50, "they did not wait for commands, one each"
    flood.stop()
    vtpms.command("vtpm-detach", web)


def test_saves_have_a_quota_of_their_own(vtpms: Installation, web: str) -> None:
    shown = vtpms.attach(web, "guest", "--saves-per-second", str(RATE))
    guest = Guest(shown["endpoint"])
    guest.define(INDEX, 8)
    started = time.monotonic()
    for number in range(3 * RATE):
        guest.write(INDEX, number.to_bytes(8))
    held_back = time.monotonic() - started
    assert RATE * held_back >= 2 * RATE - 2
    for _ in range(10 * RATE):
        guest.good(tpm.get_random(8))
    guest.close()
    assert vtpms.show(web)["saves_per_second"] == RATE


def test_nv_has_a_quota_and_what_is_there_goes_on(vtpms: Installation, web: str) -> None:
    shown = vtpms.attach(web, "guest", "--nv-bytes", "1000")
    guest = Guest(shown["endpoint"])
    guest.define(INDEX, 400)
    guest.write(INDEX, b"x" * 400)
    guest.define(INDEX + 1, 400)
    assert guest.code(tpm.nv_define(INDEX + 2, 400)) == NV_SPACE
    guest.define(INDEX + 2, 80)  # each index takes 39 bytes of its own
    assert guest.code(tpm.nv_define(INDEX + 3, 8)) == NV_SPACE
    guest.write(INDEX, b"y" * 400)
    vtpms.command("vtpm-reset-platform", web)
    assert guest.read(INDEX, 400) == b"y" * 400
    assert guest.code(tpm.nv_define(INDEX + 3, 8)) == NV_SPACE
    guest.close()
    vtpms.command("vtpm-detach", web)
    guest = Guest(vtpms.attach(web)["endpoint"])
    guest.define(INDEX + 3, 2000)  # an attachment without a quota
    guest.close()


def test_a_quota_is_kept_over_crash_and_restart_and_shown(vtpms: Installation, web: str) -> None:
    vtpms.attach(web, "guest", "--commands-per-second", "500", "--nv-bytes", "300")
    vtpms.restart()
    assert quotas(vtpms.show(web)) == (500, None, 300)
    guest = Guest(vtpms.show(web)["endpoint"])
    assert guest.code(tpm.nv_define(INDEX, 400)) == NV_SPACE
    guest.close()
    vtpms.command("vtpm-detach", web)
    assert quotas(vtpms.show(web)) == (None, None, None)


def test_the_configuration_has_defaults_and_an_attachment_its_own(vtpms: Installation, web: str) -> None:
    vtpms.configure("nv_bytes", 300)
    vtpms.restart()
    vtpms.add("db")
    assert quotas(vtpms.attach(web)) == (None, None, 300)
    assert quotas(vtpms.attach("db", "guest", "--nv-bytes", "0")) == (None, None, None)
    status = vtpms.vtpm_manager("status", "--json").json
    assert (status["commands_per_second"], status["saves_per_second"], status["nv_bytes"]) == (None, None, 300)
    vtpms.configure("nv_bytes", 0)
    vtpms.restart()


@pytest.mark.parametrize("words", [("--commands-per-second", "-1"), ("--nv-bytes", "9999999999")])
def test_a_quota_that_cannot_be_is_a_usage_error(vtpms: Installation, web: str, words: tuple[str, str]) -> None:
    refused = vtpms.command("vtpm-attach", web, "guest", *words, check=False)
    assert refused.code == 2
    assert vtpms.show(web)["guest"] is None

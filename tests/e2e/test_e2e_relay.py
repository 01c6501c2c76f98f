"""vtpm-relay between two networks: QEMU's conversation on one side, vTPMs on the other, restarts and cuts between."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import BIN, Guest, Installation, alive, installation, wait_for
from guest_rig import built_image
from qemu_rig import Qemu
from relay_rig import FAILURE, Namespaces, QemuClient, Relay, relay, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
PCR = 10
REFUSED = "a connection was refused: no TLS with the peer"


@pytest.fixture(scope="module")
def far_host() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        for name, frontend in (("web", "qemu"), ("db", "socket"), ("hidden", "qemu")):
            made.add(name)
            made.attach(name, "guest", "--frontend", frontend)
        yield made


@pytest.fixture(scope="module")
def spaces() -> Iterator[Namespaces]:
    made = Namespaces()
    yield made
    made.close()


@pytest.fixture(scope="module")
def joined(far_host: Installation, spaces: Namespaces) -> Iterator[Relay]:
    places = ["--socket", str(far_host.runtime / "admin.sock")]
    with relay(places, spaces=spaces, vtpms='["web", "d*"]', options="--ports 9300:7 --patience 30") as made:
        made.start_far()
        made.start_near()
        yield made


@pytest.fixture
def qemu(joined: Relay) -> Iterator[QemuClient]:
    made = QemuClient(joined.control("web"))
    made.power_on()
    yield made
    made.result(0x03)
    made.close()


class Extending:
    """Extends one PCR without a pause, each time by another digest, and knows what was answered."""

    def __init__(self, client: QemuClient | Guest) -> None:
        self.client = client
        self.answers: list[int] = []
        self.ending = False
        self.broken: Exception | None = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    @staticmethod
    def digest(number: int) -> bytes:
        return hashlib.sha256(number.to_bytes(4, "big")).digest()

    def _run(self) -> None:
        try:
            while not self.ending:
                number = len(self.answers)
                self.answers.append(-1)
                self.answers[number] = self.client.code(tpm.pcr_extend(PCR, self.digest(number)))
        except Exception as error:  # noqa: BLE001 - shown by `end`
            self.broken = error

    def goes_on(self, more: int = 20) -> None:
        begun = len(self.answers)
        wait_for(lambda: len(self.answers) > begun + more or self.broken, "commands that go on")
        assert self.broken is None, self.broken

    def end(self) -> list[int]:
        """Every success was executed once and in order, every failure at most once; returns the failures."""
        self.ending = True
        self.thread.join()
        assert self.broken is None, self.broken
        failures = [number for number, code in enumerate(self.answers) if code]
        assert len(failures) <= 10, f"{len(failures)} of {len(self.answers)} failed"
        assert {self.answers[number] for number in failures} <= {0x101}
        found = self.client.good(tpm.pcr_read(PCR))[-32:]
        for executed in itertools.product((True, False), repeat=len(failures)):
            left_out = {number for number, was in zip(failures, executed, strict=True) if not was}
            value = bytes(32)
            for number in range(len(self.answers)):
                if number not in left_out:
                    value = hashlib.sha256(value + self.digest(number)).digest()
            if value == found:
                return failures
        raise AssertionError(f"a command was executed twice, or is lost: {len(self.answers)} asked, {failures} failed")


def test_qemus_conversation_and_localities(qemu: QemuClient) -> None:
    assert qemu.code(tpm.pcr_extend(20), 0) == 0x907
    qemu.good(tpm.pcr_extend(20), 2)
    assert qemu.result(0x05, bytes([4, 0, 0, 0])) == 0x3D
    qemu.control.sendall(bytes.fromhex("0000000500") + bytes(3) + bytes.fromhex("00000001"))  # in one piece
    assert qemu.read(qemu.control, 12)[:8] == bytes(8)


def test_the_far_manager_is_killed_and_stepped_down_under_a_guest(
    far_host: Installation, joined: Relay, qemu: QemuClient
) -> None:
    busy = Extending(qemu)
    for number in (signal.SIGKILL, signal.SIGHUP):
        busy.goes_on()
        far_host.stop(number)
        busy.goes_on()  # extending a PCR saves nothing, and needs no manager
        far_host.start()
    busy.goes_on()
    assert busy.end() == []


def test_the_far_relay_is_restarted_and_nothing_fails(joined: Relay, qemu: QemuClient) -> None:
    qemu.good(tpm.pcr_extend(20), 2)
    busy = Extending(qemu)
    qemu.locality = 0  # as QEMU, which does not say again what it has said
    for _ in range(3):
        busy.goes_on()
        joined.restart_far()
    busy.goes_on()
    assert busy.end() == []


def test_the_far_relay_is_killed_and_the_tpm_stays_on(joined: Relay, qemu: QemuClient) -> None:
    busy = Extending(qemu)
    for _ in range(3):
        busy.goes_on()
        joined.restart_far(signal.SIGKILL)
    busy.goes_on()
    assert len(busy.end()) <= 3


def test_a_program_on_the_data_socket_gets_each_command_executed_once(joined: Relay) -> None:
    guest = Guest(str(joined.data("db")))
    busy = Extending(guest)
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
        busy.goes_on()
        joined.restart_far(number)
    busy.goes_on()
    assert len(busy.end()) <= 2
    guest.close()


def test_the_cable_is_pulled_and_the_connection_reset(joined: Relay, spaces: Namespaces, qemu: QemuClient) -> None:
    if not spaces.near:
        pytest.skip("no namespaces here: there is no cable")
    busy = Extending(qemu)
    busy.goes_on()
    spaces.cut()
    begun = len(busy.answers)
    joined.restart_far()  # its address is the same, but the old connection is nobody's
    time.sleep(1.0)
    assert len(busy.answers) <= begun + 1
    spaces.mend()
    busy.goes_on()
    assert busy.end() == []


def test_a_crashed_instance_answers_failure_until_reset_and_has_its_locality_again(
    far_host: Installation, joined: Relay, qemu: QemuClient
) -> None:
    qemu.good(tpm.pcr_extend(20), 2)
    pid = far_host.show("web")["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not alive(pid), "its end")
    assert qemu.raw(tpm.pcr_read(20)) == FAILURE, "a fresh TPM in place of the one that crashed"
    wait_for(lambda: far_host.show("web")["pid"] not in (None, pid), "the next instance")
    assert qemu.raw(tpm.pcr_read(20)) == FAILURE
    assert qemu.result(0x0E) == 0
    assert qemu.result(0x02, bytes(4)) == 0
    assert qemu.result(0x05, bytes([2, 0, 0, 0])) == 0
    assert qemu.result(0x05, bytes(4)) == 0
    qemu.good(tpm.STARTUP_CLEAR)
    qemu.good(tpm.pcr_extend(20), 2)


def test_a_vtpm_hibernates_and_wakes_behind_the_relay(far_host: Installation, qemu: QemuClient) -> None:
    qemu.good(tpm.pcr_extend(PCR, b"\x21" * 32))
    far_host.command("vtpm-hibernate", "web")
    assert far_host.show("web")["state"] == "hibernated"
    assert qemu.good(tpm.pcr_read(PCR))[-32:] == hashlib.sha256(bytes(32) + b"\x21" * 32).digest()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_near_relay_that_is_started_again_serves_the_next_qemu(joined: Relay, number: signal.Signals) -> None:
    first = QemuClient(joined.control("web"))
    first.power_on()
    first.good(tpm.pcr_extend(PCR))
    assert joined.near is not None
    joined.near.send_signal(number)
    joined.near.wait(20)
    first.close()
    joined.start_near()
    second = QemuClient(joined.control("web"))
    second.power_on()
    assert second.good(tpm.pcr_read(PCR))[-32:] == bytes(32), "the TPM of a machine that has gone"
    second.close()


def test_tpm2_tools_by_socket_and_by_a_port_that_stays(far_host: Installation, joined: Relay) -> None:
    shown = subprocess.run(
        [str(BIN / "vtpm-relay"), "list", "--directory", str(joined.directory), "--ports", "9300:7"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    listed = {each["name"]: each for each in json.loads(shown)}
    assert {name: each["port"] for name, each in listed.items()} == {"db": 9300, "web": 9307}
    data = joined.data("db")
    environment = os.environ | {"TSS2_LOG": "all+NONE"}
    for tcti in (f"swtpm:path={data}", "swtpm:host=127.0.0.1,port=9300"):
        prefix = joined.spaces.near if joined.spaces else []
        done = subprocess.run(
            [*prefix, "tpm2_getrandom", "--hex", "8"], env=environment | {"TPM2TOOLS_TCTI": tcti},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert (done.returncode, len(done.stdout)) == (0, 16), done.stderr


def test_a_vtpm_that_a_client_may_not_reach_has_no_endpoint_and_no_answer(joined: Relay) -> None:
    joined.control("web")
    assert not (joined.directory / "hidden").exists()
    joined.near.kill()
    joined.near.wait()
    assignments = joined.directory / "assignments.json"
    text = assignments.read_text()
    assignments.write_text('{"db": 0, "web": 1, "hidden": 2}')
    joined.start_near()
    with pytest.raises(ConnectionResetError):
        QemuClient(joined.control("hidden"))
    assert "may not reach vTPM hidden" in joined.log("far")
    assignments.write_text(text)


def test_who_is_taken_out_of_the_file_is_turned_away_in_the_middle(joined: Relay) -> None:
    client = QemuClient(joined.control("web"))
    client.power_on()
    joined.reread('["db"]')
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        _go_on(client)
    client.close()
    joined.reread('["web", "d*"]')
    again = QemuClient(joined.control("web"))
    again.power_on()
    again.close()


def _go_on(client: QemuClient) -> None:
    for _ in range(2000):
        client.good(tpm.get_random(8))


def test_only_pinned_certificates_meet(joined: Relay, tmp_path: Path) -> None:
    for name in ("stranger", "impostor"):
        (joined.base / name).mkdir()
        run(str(BIN / "vtpm-relay"), "key", str(joined.base / name), "--name", "near-id")
    prefix = joined.spaces.near if joined.spaces else []

    def attempt(identity: str, expected: str) -> str:
        words = ["connect", "--to", joined.address, "--directory", str(tmp_path / identity), "--identity"]
        words += [str(joined.base / identity), "--far-certificate", str(joined.base / expected / "relay.crt")]
        with (tmp_path / f"{identity}.log").open("w+") as log:
            process = subprocess.Popen([*prefix, str(BIN / "vtpm-relay"), *words], stderr=log)
            wait_for(lambda: "no far side" in (tmp_path / f"{identity}.log").read_text(), "a refusal")
            process.kill()
            process.wait()
        assert not (tmp_path / identity / "web").exists()
        return (tmp_path / f"{identity}.log").read_text()

    before = joined.log("far")
    assert "is here" not in attempt("stranger", "far-id")
    assert "certificate verify failed" in attempt("near-id", "impostor")
    assert "a connection was refused" in joined.log("far")[len(before) :]


def test_older_tls_and_no_certificate_are_refused(joined: Relay) -> None:
    prefix = joined.spaces.near if joined.spaces else []
    address = joined.address.removeprefix("tls:")
    for options in (["-tls1_2"], ["-tls1_3"]):
        before = joined.log("far").count(REFUSED)
        words = [*prefix, "openssl", "s_client", "-connect", address, *options]
        subprocess.run(words, input=b"", capture_output=True, timeout=30, check=False)
        wait_for(lambda seen=before: joined.log("far").count(REFUSED) > seen, f"a refusal of {options}")


@pytest.mark.slow
def test_a_linux_guest_under_qemu_keeps_its_tpm(far_host: Installation, joined: Relay, tmp_path: Path) -> None:
    control = joined.control("web")
    back_end = ["-chardev", f"socket,id=c0,path={control}", "-tpmdev", "emulator,id=tpm0,chardev=c0"]
    machine = Qemu(tmp_path, built_image("client"), back_end, device="tpm-crb")
    try:
        machine.boot()
        machine.guest.good("export TPM2TOOLS_TCTI=device:/dev/tpmrm0")
        machine.guest.good("tpm2 nvdefine 0x1500016 -C o -s 6 -a 'ownerread|ownerwrite'")
        machine.guest.good("printf secret >/tmp/secret && tpm2 nvwrite 0x1500016 -C o -i /tmp/secret")
        measured = machine.guest.good("cat /sys/class/tpm/tpm0/pcr-sha256/0")
        assert set(measured) != {"0"}
        far_host.stop(signal.SIGHUP)
        far_host.start()
        joined.restart_far(signal.SIGKILL)
        with suppress(AssertionError):  # the first command after a kill may be answered with failure
            machine.guest.run("tpm2 getrandom 4")
        assert machine.guest.good("tpm2 nvread 0x1500016 -C o -s 6") == "secret"
        assert machine.guest.good("cat /sys/class/tpm/tpm0/pcr-sha256/0") == measured
        machine.power_off()
    finally:
        machine.kill()

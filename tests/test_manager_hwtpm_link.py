import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fixtures_tpm import SwtpmProcess, recorded_bus, running_swtpm
from tpm2_pytss import ESYS_TR, TPM2_ALG, TPM2_CC, TPM2_SE

from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import (
    BadSetting,
    TpmBusy,
    TpmFailureMode,
    TpmNotStarted,
    TpmTransport,
    TpmUnavailable,
    TpmWasReset,
    UnknownTpmCode,
    WrongLocality,
)
from manager.hwtpm_link import flushed
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.hwtpm_templates import srk_template

CC_GET_TEST_RESULT = int(TPM2_CC.GetTestResult)
CC_READ_CLOCK = int(TPM2_CC.ReadClock)
RC_RETRY = bytes.fromhex("80010000000a00000922")


@pytest.fixture
def swtpm() -> Iterator[SwtpmProcess]:
    with running_swtpm() as process:
        yield process


def test_a_missing_socket_is_unavailable_at_once(tmp_path: Path) -> None:
    setting = TctiSetting.parse(f"swtpm:path={tmp_path}/none")
    with pytest.raises(TpmUnavailable, match=r"No such file.*--tcti") as refused:
        HardwareTpm.open(setting)
    assert not isinstance(refused.value, TpmBusy)
    assert refused.value.code == 7


def test_a_missing_device_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(TpmUnavailable, match="No such file"):
        HardwareTpm.open(TctiSetting.parse(f"device:{tmp_path}/tpm0"), locality=0)


def test_a_refused_connection_is_tried_until_the_deadline(swtpm: SwtpmProcess) -> None:
    swtpm.kill()
    with pytest.raises(TpmBusy, match=r"busy for 0\.1 s.*refused") as refused:
        HardwareTpm.open(swtpm.setting, deadline=0.1)
    assert refused.value.code == 7


def test_a_tpm_held_by_another_owner_is_waited_for_and_then_given_up(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting) as first:
        with pytest.raises(TpmBusy):
            HardwareTpm.open(swtpm.setting, deadline=0.2)
        assert first.clock()
    with HardwareTpm.open(swtpm.setting) as second:
        assert second.clock()


def test_a_tpm_that_becomes_free_in_time_is_opened(swtpm: SwtpmProcess) -> None:
    first = HardwareTpm.open(swtpm.setting)
    timer = threading.Timer(0.1, first.close)
    timer.start()
    with HardwareTpm.open(swtpm.setting, deadline=10) as second:
        assert second.clock()
    timer.join()


def test_a_tpm_that_starts_in_time_is_opened(swtpm: SwtpmProcess) -> None:
    """Nobody listens behind either name at first; then, without a moment in which a name is missing, swtpm does."""
    names = [swtpm.directory / "late", swtpm.directory / "late.ctrl"]
    for name in names:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(name))

    def start() -> None:
        for name, real in zip(names, (swtpm.socket, swtpm.socket + ".ctrl"), strict=True):
            link = name.with_name(name.name + ".new")
            link.symlink_to(real)
            link.replace(name)

    timer = threading.Timer(0.1, start)
    timer.start()
    with HardwareTpm.open(TctiSetting.parse(f"swtpm:path={names[0]}"), deadline=10) as tpm:
        assert tpm.clock()
    timer.join()


def test_a_tpm_nobody_started_is_the_firmwares_job() -> None:
    with running_swtpm(flags="not-need-init") as swtpm, pytest.raises(TpmNotStarted, match="firmware"):
        HardwareTpm.open(swtpm.setting)


@pytest.mark.parametrize(
    "answer",
    [
        "80010000000a00000101",  # TPM_RC_FAILURE as the command's own code
        "800100000010000000000000" + "00000101",  # success, with a test result of TPM_RC_FAILURE
    ],
)
def test_failure_mode_is_fatal(swtpm: SwtpmProcess, answer: str) -> None:
    with recorded_bus(swtpm) as bus:
        bus.alter[CC_GET_TEST_RESULT] = bytes.fromhex(answer)
        with pytest.raises(TpmFailureMode, match="Power-cycle"):
            HardwareTpm.open(bus.setting)
        HardwareTpm.open(bus.setting).close()


def test_a_self_test_that_runs_is_waited_for(swtpm: SwtpmProcess) -> None:
    running = bytes.fromhex("800100000010000000000000" + "0000090a")  # success; the result is TPM_RC_TESTING
    with recorded_bus(swtpm) as bus:
        bus.alter[CC_GET_TEST_RESULT] = running
        with HardwareTpm.open(bus.setting) as tpm:
            assert tpm.clock()

        class Forever(dict[int, bytes]):
            def __contains__(self, code: object) -> bool:
                return code == CC_GET_TEST_RESULT

            def pop(self, _: int) -> bytes:  # type: ignore[override]
                return running

        bus.alter = Forever()
        with pytest.raises(TpmBusy, match="still tests itself"):
            HardwareTpm.open(bus.setting, deadline=0.2)


def test_a_tpm_reset_in_the_middle_of_a_session_is_told_and_then_forgotten(swtpm: SwtpmProcess) -> None:
    def work(tpm: HardwareTpm) -> None:
        tpm.open_srk(name)
        assert len(tpm.random(16)) == 16

    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        name = tpm.provision_srk()
        before = len(bus.commands)
        work(tpm)
        places = len(bus.commands) - before
        told = 0
        for place in range(places):
            bus.reset_at = place
            resets = tpm.clock().reset_count if place else 0
            try:
                work(tpm)
            except TpmWasReset as error:
                assert "it was reset" in str(error)  # noqa: PT017 - not each place raises
                told += 1
            bus.reset_at = None
            work(tpm)
            assert tpm.clock().reset_count > resets
        assert told > 0


def test_failure_mode_while_open_is_said(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        bus.alter[CC_READ_CLOCK] = bytes.fromhex("80010000000a00000101")
        with pytest.raises(TpmFailureMode):
            tpm.clock()


@pytest.mark.parametrize("code", ["00000922", "00000908", "0000090a", "00000920", "00000923"])
def test_a_tpm_that_asks_for_patience_gets_the_same_command_again(swtpm: SwtpmProcess, code: str) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        before = tpm.commands_sent
        bus.alter[CC_READ_CLOCK] = bytes.fromhex("80010000000a" + code)
        assert tpm.clock()
        assert tpm.commands_sent == before + 2


def test_patience_ends_at_the_deadline(swtpm: SwtpmProcess) -> None:
    class Forever(dict[int, bytes]):
        def __contains__(self, code: object) -> bool:
            return code == CC_READ_CLOCK

        def pop(self, _: int) -> bytes:  # type: ignore[override]
            return RC_RETRY

    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting, command_seconds=0.2) as tpm:
        bus.alter = Forever()
        with pytest.raises(TpmBusy, match=r"0\.2 s.*0x922 to every try"):
            tpm.clock()
        bus.alter = {}
        assert tpm.clock()


@pytest.mark.parametrize(
    "answer",
    [
        "8001" + "00000005" + "00000000",  # tells less than its head
        "8001" + "00001001" + "00000000",  # tells more than a TPM may answer
    ],
)
def test_an_answer_with_an_impossible_length_ends_the_connection(swtpm: SwtpmProcess, answer: str) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        bus.alter[CC_READ_CLOCK] = bytes.fromhex(answer)
        with pytest.raises(TpmTransport, match="header tells"):
            tpm.clock()
        assert tpm.clock()


def test_an_unknown_code_is_shown_in_hex_and_words(swtpm: SwtpmProcess) -> None:
    with recorded_bus(swtpm) as bus, HardwareTpm.open(bus.setting) as tpm:
        bus.alter[CC_READ_CLOCK] = bytes.fromhex("80010000000a0000012d")
        with pytest.raises(UnknownTpmCode, match=r"refused to read the clock: response code 0x12d \(tpm:"):
            tpm.clock()


def test_a_tpm_that_goes_away_is_connected_anew_when_it_is_back(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(swtpm.setting, deadline=0.2) as tpm:
        before = tpm.clock().reset_count
        swtpm.kill()
        with pytest.raises(TpmTransport):
            tpm.clock()
        with pytest.raises(TpmBusy):
            tpm.clock()
        swtpm.start()
        assert tpm.clock().reset_count == before + 1


def test_a_closed_tpm_stays_closed(swtpm: SwtpmProcess) -> None:
    tpm = HardwareTpm.open(swtpm.setting)
    tpm.close()
    tpm.close()
    with pytest.raises(TpmUnavailable, match="closed by this process"):
        tpm.clock()


def test_what_a_dead_owner_left_in_the_tpm_is_flushed_at_open(swtpm: SwtpmProcess) -> None:
    dead = HardwareTpm.open(swtpm.setting)
    with dead._link.operation("die in the middle") as esapi:
        esapi.create_primary(None, srk_template(), ESYS_TR.OWNER)
        esapi.start_auth_session(ESYS_TR.NONE, ESYS_TR.NONE, TPM2_SE.POLICY, None, TPM2_ALG.SHA256)
    assert len(dead.transient_handles()) == 2
    dead.close()
    with HardwareTpm.open(swtpm.setting) as tpm:
        assert tpm.transient_handles() == ()


def test_our_own_exception_inside_an_operation_flushes_and_passes(swtpm: SwtpmProcess) -> None:
    def fail(tpm: HardwareTpm) -> None:
        with tpm._link.operation("fail in a test") as esapi:
            handle = esapi.create_primary(None, srk_template(), ESYS_TR.OWNER)[0]
            with flushed(esapi, handle), tpm._link.session(esapi, handle):
                raise LookupError

    with HardwareTpm.open(swtpm.setting) as tpm:
        with pytest.raises(LookupError):
            fail(tpm)
        assert tpm.transient_handles() == ()


def test_a_signal_during_a_command_comes_out_and_the_tpm_can_be_used_again(swtpm: SwtpmProcess) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with HardwareTpm.open(swtpm.setting) as tpm:
            assert swtpm.process is not None
            swtpm.process.send_signal(signal.SIGSTOP)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                tpm.clock()
            swtpm.process.send_signal(signal.SIGCONT)
            assert tpm.clock()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_two_threads_at_once_are_a_bug_that_is_said(swtpm: SwtpmProcess) -> None:
    failures: list[str] = []

    def intrude(tpm: HardwareTpm) -> None:
        try:
            tpm.clock()
        except RuntimeError as error:
            failures.append(str(error))

    with HardwareTpm.open(swtpm.setting) as tpm:
        with tpm._link.operation("hold it in a test"):
            thread = threading.Thread(target=intrude, args=(tpm,))
            thread.start()
            thread.join()
        assert failures == ["two threads use the hardware TPM at once (to read the clock); go through TpmLane"]
        assert tpm.clock()


def test_the_embedded_setting_must_be_started_first() -> None:
    with pytest.raises(BadSetting, match="Start EmbeddedTpm"):
        HardwareTpm.open(TctiSetting.parse("embedded"))


def test_a_silent_control_channel_is_busy(tmp_path: Path) -> None:
    listeners = []
    for suffix in (".ctrl", ""):
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{tmp_path}/t{suffix}")
        listener.listen()
        listeners.append(listener)
    with pytest.raises(TpmBusy, match="control channel does not answer"):
        HardwareTpm.open(TctiSetting.parse(f"swtpm:path={tmp_path}/t"), deadline=0.2, command_seconds=0.2)
    for listener in listeners:
        listener.close()


def free_port_pair() -> int:
    for port in range(20000 + os.getpid() % 10000, 60000, 2):
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise AssertionError


def test_swtpm_is_reached_over_tcp(swtpm: SwtpmProcess) -> None:
    with bridged(swtpm, free_port_pair()) as setting, HardwareTpm.open(setting) as tpm:
        assert tpm.check_locality().refused_at_zero
    assert setting.kind is TctiKind.SWTPM_TCP


@contextmanager
def bridged(swtpm: SwtpmProcess, port: int) -> Iterator[TctiSetting]:
    """swtpm itself on TCP, on the state of the one given."""
    import subprocess

    swtpm.stop()
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={swtpm.directory}"]
    command += ["--server", f"type=tcp,port={port}", "--ctrl", f"type=tcp,port={port + 1}"]
    with subprocess.Popen([*command, "--flags", swtpm.flags]) as process:
        deadline = time.monotonic() + 10
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port + 1)) == 0:
                    break
            assert time.monotonic() < deadline
            time.sleep(0.005)
        yield TctiSetting.parse(f"swtpm:host=127.0.0.1,port={port}")
        process.terminate()


def test_any_other_tcti_goes_through_the_tss_loader(swtpm: SwtpmProcess) -> None:
    with HardwareTpm.open(TctiSetting(TctiKind.LOADER, swtpm.setting.text)) as tpm:
        assert tpm.check_locality().refused_at_zero
        tpm.provision_srk()
        assert len(tpm.random(8)) == 8


def test_a_tcti_the_loader_does_not_know_is_unavailable() -> None:
    with pytest.raises(TpmUnavailable, match="tpm2-tss cannot open"):
        HardwareTpm.open(TctiSetting.parse("no-such-tcti:x=y"))


@contextmanager
def terminal_device(swtpm: SwtpmProcess) -> Iterator[str]:
    """A character device (a raw terminal) whose other end passes commands to swtpm, as /dev/tpm0 would."""
    import tty

    near, far = os.openpty()
    tty.setraw(near)
    tty.setraw(far)
    stop_reader, stop_writer = socket.socketpair()

    def serve() -> None:
        import select

        with socket.socket(socket.AF_UNIX) as client:
            client.connect(swtpm.socket)
            while stop_reader not in (ready := select.select([near, stop_reader], [], [])[0]):
                assert ready
                client.sendall(os.read(near, 4096))
                os.write(near, client.recv(4096))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield os.ttyname(far)
    finally:
        stop_writer.close()
        thread.join(10)
        stop_reader.close()
        os.close(near)
        os.close(far)


def test_a_character_device_serves_locality_zero_only(swtpm: SwtpmProcess) -> None:
    with terminal_device(swtpm) as path:
        setting = TctiSetting.parse(f"device:{path}")
        with pytest.raises(WrongLocality, match=r"gives locality 0 only.*--allow-locality 0"):
            HardwareTpm.open(setting)
        with HardwareTpm.open(setting, locality=0) as tpm:
            assert tpm.check_locality().weaker
            name = tpm.provision_srk()
            tpm.open_srk(name)
            assert len(tpm.random(16)) == 16


def test_a_tcti_of_the_loader_without_localities_serves_the_weaker_mode_only(swtpm: SwtpmProcess) -> None:
    with terminal_device(swtpm) as path:
        setting = TctiSetting(TctiKind.LOADER, f"device:{path}")
        with pytest.raises(WrongLocality, match="its TCTI answered"):
            HardwareTpm.open(setting)
        with HardwareTpm.open(setting, locality=0) as tpm:
            assert tpm.check_locality().weaker


def test_a_character_device_that_does_not_answer_is_given_up_at_the_deadline(swtpm: SwtpmProcess) -> None:
    with terminal_device(swtpm) as path:
        assert swtpm.process is not None
        swtpm.process.send_signal(signal.SIGSTOP)
        with pytest.raises(TpmBusy, match="does not answer"):
            HardwareTpm.open(TctiSetting.parse(f"device:{path}"), locality=0, deadline=0.2)
        swtpm.process.send_signal(signal.SIGCONT)

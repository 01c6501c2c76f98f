import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manager import embedded
from manager.embedded import EmbeddedTpm
from manager.hwtpm import HardwareTpm
from manager.hwtpm_errors import BadSetting, TpmBusy, TpmTransport, TpmUnavailable


@pytest.fixture
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import shutil
    import tempfile

    path = tempfile.mkdtemp(prefix="emb")
    yield path
    shutil.rmtree(path)


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


def test_it_starts_warns_and_serves_locality_two(state: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), EmbeddedTpm(state) as tpm:
        assert "demos and tests only" in caplog.text
        assert state in caplog.text
        with HardwareTpm.open(tpm.setting) as opened:
            assert opened.check_locality().refused_at_zero
        pid = tpm.pid
        assert pid is not None
    assert tpm.pid is None
    assert gone(pid)


def test_its_state_survives_and_a_clean_stop_keeps_the_clock_safe(state: str) -> None:
    tpm = EmbeddedTpm(state)
    with HardwareTpm.open(tpm.start()) as opened:
        name, clock = opened.provision_srk(), opened.clock()
    tpm.stop()
    tpm.stop()
    with HardwareTpm.open(tpm.start()) as opened:
        opened.open_srk(name)
        assert opened.clock().reset_count == clock.reset_count + 1
        assert opened.clock().safe
    tpm.stop()


def test_its_files_are_for_the_manager_alone(state: str) -> None:
    path = os.path.join(state, "tpm")
    with EmbeddedTpm(path):
        assert os.stat(path).st_mode & 0o077 == 0
        assert os.stat(os.path.join(path, "tpm.sock")).st_mode & 0o077 == 0


def test_a_second_one_on_the_same_state_is_refused(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "STOP_SECONDS", 0.1)
    with EmbeddedTpm(state) as tpm:
        with pytest.raises(TpmBusy, match="another manager uses"):
            EmbeddedTpm(state).start()
        with HardwareTpm.open(tpm.setting) as opened:
            assert opened.clock()


def test_starting_twice_is_a_bug_that_is_said(state: str) -> None:
    with EmbeddedTpm(state) as tpm, pytest.raises(RuntimeError, match="runs already"):
        tpm.start()


def test_only_the_main_thread_may_start_it(state: str) -> None:
    said: list[str] = []

    def start() -> None:
        try:
            EmbeddedTpm(state).start()
        except RuntimeError as error:
            said.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert said == ["start the embedded TPM from the main thread: it would end with any other"]


def test_a_path_too_long_for_a_socket_is_said_before_anything_is_made(state: str) -> None:
    long = os.path.join(state, "d" * 100)
    with pytest.raises(BadSetting, match="107 are possible"):
        EmbeddedTpm(long)
    assert not os.path.exists(long)


def test_a_machine_without_swtpm_is_told_how_to_get_it(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TpmUnavailable, match="apt install swtpm"):
        EmbeddedTpm(state).start()
    monkeypatch.undo()
    with EmbeddedTpm(state) as tpm:
        assert tpm.pid


def test_a_damaged_state_is_kept_and_never_becomes_a_fresh_tpm(state: str) -> None:
    with EmbeddedTpm(state) as tpm, HardwareTpm.open(tpm.setting) as opened:
        opened.provision_srk()
    (permanent,) = Path(state).glob("tpm2-*.permall")
    permanent.write_bytes(b"damaged" * 100)
    with pytest.raises(TpmUnavailable, match=r"swtpm ended with|in failure mode"):
        use(EmbeddedTpm(state))
    assert permanent.read_bytes() == b"damaged" * 100


def use(tpm: EmbeddedTpm) -> None:
    with tpm, HardwareTpm.open(tpm.setting) as opened:
        opened.clock()


def test_it_ends_when_the_manager_is_killed_and_the_next_one_takes_over(state: str) -> None:
    code = (
        "import sys, signal\n"
        "from manager.embedded import EmbeddedTpm\n"
        "tpm = EmbeddedTpm(sys.argv[1]); tpm.start(); print(tpm.pid, flush=True); signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, state], stdout=subprocess.PIPE, text=True) as manager:
        assert manager.stdout is not None
        pid = int(manager.stdout.readline())
        manager.send_signal(signal.SIGKILL)
    with EmbeddedTpm(state) as tpm, HardwareTpm.open(tpm.setting) as opened:
        assert tpm.pid != pid
        assert opened.clock()
    assert gone(pid)


def test_a_killed_swtpm_is_noticed_and_stop_still_cleans_up(state: str) -> None:
    tpm = EmbeddedTpm(state)
    with HardwareTpm.open(tpm.start()) as opened:
        assert tpm.pid is not None
        os.kill(tpm.pid, signal.SIGKILL)
        assert gone(tpm.pid)
        with pytest.raises(TpmTransport):
            opened.clock()
    tpm.stop()
    with EmbeddedTpm(state) as again:
        assert again.pid

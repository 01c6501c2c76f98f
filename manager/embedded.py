"""The embedded stand-in for a hardware TPM: our own swtpm in the state directory, for demos and tests.

It protects nothing: its secrets lie in files beside the store. A warning says so at every start. A lock that swtpm
inherits keeps two of them from one state, also when the manager that started the first was killed.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from types import TracebackType
from typing import Final, Self

from manager.hwtpm_errors import TpmBusy, TpmUnavailable
from manager.hwtpm_setting import TctiSetting, check_socket_path
from manager.hwtpm_transport import CMD_SET_LOCALITY, CONTROL_RESULT, SET_LOCALITY

_log = logging.getLogger("vtpm.embedded-tpm")

READY_SECONDS: Final = 10.0
STOP_SECONDS: Final = 5.0
POLL_SECONDS: Final = 0.005
# TPM2_Shutdown(TPM_SU_CLEAR), Part 3, 9.4: an orderly stop, so that the clock stays safe.
SHUTDOWN_CLEAR: Final = bytes.fromhex("80010000000c000001450000")
WARNING: Final = (
    "the hardware TPM is an embedded swtpm with its state in %s: whoever can read these files can read every key. "
    "For demos and tests only; set --tcti to a real TPM for anything else"
)


class EmbeddedTpm:
    """A swtpm process of ours: `start` gives the setting to open, `stop` ends it, the state stays."""

    def __init__(self, state_dir: str) -> None:
        self._dir = os.path.abspath(state_dir)
        self._socket = os.path.join(self._dir, "tpm.sock")
        check_socket_path(self._socket + ".ctrl")
        self._lock = -1
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def setting(self) -> TctiSetting:
        """Return how to reach it while it runs."""
        return TctiSetting.parse(f"swtpm:path={self._socket}")

    @property
    def pid(self) -> int | None:
        """Return swtpm's process id, None while it does not run."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> TctiSetting:
        """Start swtpm, with a startup-clear, and wait until it answers. Call it from the main thread.

        Linux ends the child when the *thread* that started it ends (prctl(2), PR_SET_PDEATHSIG), and worker threads
        come and go. Raises TpmUnavailable: swtpm is not installed or does not start; TpmBusy: another one has this
        state.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("start the embedded TPM from the main thread: it would end with any other")
        if self._process is not None:
            raise RuntimeError("the embedded TPM runs already")
        os.makedirs(self._dir, mode=0o700, exist_ok=True)
        self._take_lock()
        try:
            self._spawn()
            self._wait_ready()
        except BaseException:
            self._end()
            raise
        _log.warning(WARNING, self._dir)
        return self.setting

    def stop(self) -> None:
        """Shut the TPM down in order and end swtpm; idempotent. Close HardwareTpm first."""
        if self._process is not None and self._process.poll() is None:
            self._shut_down()
        self._end()

    def _take_lock(self) -> None:
        path = os.path.join(self._dir, "lock")
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # The swtpm of a manager that was just killed gets its SIGTERM about now.
                if time.monotonic() >= deadline:
                    os.close(self._lock)
                    self._lock = -1
                    raise TpmBusy("start it", STOP_SECONDS, f"another manager uses {self._dir}") from None
                time.sleep(POLL_SECONDS)
            else:
                return

    def _spawn(self) -> None:
        for path in (self._socket, self._socket + ".ctrl"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        command = ["setpriv", "--pdeathsig", "TERM", "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self._dir}"]
        command += ["--server", f"type=unixio,path={self._socket},mode=0600"]
        command += ["--ctrl", f"type=unixio,path={self._socket}.ctrl,mode=0600"]
        command += ["--flags", "not-need-init,startup-clear"]
        if shutil.which("swtpm") is None:
            raise TpmUnavailable("swtpm is not installed", "Install it: `apt install swtpm`.")
        try:
            with open(self._log_path, "wb") as log:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(self._lock,),
                    start_new_session=True,  # Ctrl-C is for the manager, which stops it in order
                )
        except OSError as error:
            raise TpmUnavailable(
                f"swtpm could not be started ({error})", "Check that `setpriv` (util-linux) is installed."
            ) from error

    @property
    def _log_path(self) -> str:
        return os.path.join(self._dir, "swtpm.log")

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self._answers():
            assert self._process is not None, "_spawn came first"
            if self._process.poll() is not None:
                self._explain_death(self._process)
            if time.monotonic() >= deadline:
                raise TpmBusy("start it", READY_SECONDS, f"swtpm does not answer; its log is {self._log_path}")
            time.sleep(POLL_SECONDS)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(READY_SECONDS)
            try:
                client.connect(self._socket + ".ctrl")
                client.sendall(SET_LOCALITY.pack(CMD_SET_LOCALITY, 0))
                return len(client.recv(CONTROL_RESULT.size)) == CONTROL_RESULT.size
            except OSError:
                return False  # not listening yet: the caller asks again until its deadline

    def _explain_death(self, process: subprocess.Popen[bytes]) -> None:
        with open(self._log_path, encoding="utf-8", errors="replace") as log:
            said = log.read(2048).strip()
        raise TpmUnavailable(
            f"swtpm ended with {process.returncode} ({said or 'it said nothing'})",
            f"The state in {self._dir} was kept; if it is damaged only a backup helps.",
        )

    def _shut_down(self) -> None:
        """Send TPM2_Shutdown on a connection of our own; without it the TPM only reports an unclean stop."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(STOP_SECONDS)
            try:
                client.connect(self._socket)
                client.sendall(SHUTDOWN_CLEAR)
                client.recv(64)
            except OSError as error:
                _log.warning("the embedded TPM did not take TPM2_Shutdown, its clock will be unsafe: %s", error)

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                _log.warning("the embedded TPM (process %d) did not end and was killed", process.pid)
                process.kill()
                process.wait()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

"""swtpm's command line for a manager's vTPM: who may, what reaches the instance itself, how it ends. Real users."""

import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import vtpm_instance_commands as tpm
from e2e_rig import BIN, Guest, Installation, alive, installation, may_enter, wait_for
from qemu_client import GET_CAPABILITY, GET_INFO, INIT, NOT_RUNNING, SHUTDOWN, STARTUP, ask, data_connection, qemu, say

from frontend_backend.messages_admin import ExitCode
from frontend_backend.swtpm_options import Interface, parse
from manager.client import RemoteError, request
from manager.errors import UsageError
from manager.swtpm_managed import wanted
from manager.verb_table import BY_NAME

OWNER, OTHER = 64055, 64056  # nobody's here: they need no names
MANAGED = str(BIN / "vtpm-swtpm-managed")
READ_EK = bytes.fromhex("80010000000e0000017381010001")  # TPM2_ReadPublic of the endorsement key
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become others"),
]


@pytest.fixture(scope="module")
def host() -> Iterator[Installation]:
    """A manager whose admin socket everybody may open: what others cannot do, they have no role for."""
    with installation() as made:
        made.base.chmod(0o711)
        made.init()
        made.configure("socket_mode", "0666")
        made.start()
        yield made


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory in which OWNER's processes may make sockets."""
    with tempfile.TemporaryDirectory(prefix="sm") as name:
        os.chown(name, OWNER, OWNER)
        yield Path(name)


def given(host: Installation, *options: str, frontend: str = "qemu", owner: int = OWNER) -> str:
    """Make a vTPM and give it to a user; returns its UUID."""
    vtpm = host.add(f"v-{uuid4().hex[:8]}", *options)
    host.attach(vtpm, "guest", "--frontend", frontend, "--owner", f"{owner}:{owner}")
    return vtpm


@pytest.fixture(scope="module")
def shared(host: Installation) -> str:
    """A vTPM that was given to OWNER."""
    return given(host)


@contextmanager
def effectively(uid: int) -> Iterator[None]:
    """Be another user meanwhile."""
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)


def as_user(uid: int, words: Sequence[str]) -> list[str]:
    if uid and not may_enter(uid):
        pytest.skip("other users may not enter the directory of this clone")
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *words] if uid else list(words)


def words_for(host: Installation, vtpm: str | None, *more: str) -> list[str]:
    named = [] if vtpm is None else ["--vtpm", vtpm]
    return [MANAGED, "socket", f"--manager={host.runtime}/admin.sock", *named, *more]


def refused(uid: int, words: Sequence[str], **environment: str) -> tuple[int, str]:
    """Run a command line that is expected to be refused; returns its exit code and what it says."""
    done = subprocess.run(
        as_user(uid, words), capture_output=True, text=True, timeout=60, env=os.environ | environment, check=False
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


class Running:
    """The command in swtpm's place, running, with a control socket at `path`."""

    def __init__(self, place: Path, words: Sequence[str], uid: int = OWNER, control: str = "") -> None:
        self.path = place / "ctrl"
        left = self._made()  # by one that was killed
        self.process = subprocess.Popen(
            as_user(uid, [*words, "--ctrl", f"type=unixio,path={self.path},mode=0600{control}"])
        )
        wait_for(lambda: self._made() not in (0, left) or self.process.poll() is not None, "the control socket")
        assert self.process.poll() is None

    def _made(self) -> int:
        return self.path.stat().st_ctime_ns if self.path.exists() else 0

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(30)
        wait_for(lambda: sock.connect_ex(str(self.path)) == 0, "its ear")
        return sock

    def ended(self) -> int:
        code = self.process.wait(30)
        assert not self.path.exists(), "its socket is left"
        return code


def test_a_data_connection_goes_to_the_instance_itself(host: Installation, place: Path) -> None:
    vtpm = given(host)
    running = Running(place, words_for(host, vtpm, "--tpm2", "--pid", f"file={place}/pid", "--terminate"))
    wait_for(lambda: (place / "pid").exists() and (place / "pid").read_text(), "the pid file")
    assert int((place / "pid").read_text()) == running.process.pid
    with running.connect() as control, data_connection(control) as data:
        assert say(data, tpm.get_random(8)) == NOT_RUNNING
        assert ask(control, INIT, bytes(4)) == bytes(4)
        running.process.send_signal(signal.SIGSTOP)  # whoever relays is not there any more
        assert tpm.rc(say(data, STARTUP)) == 0
        assert len(say(data, tpm.get_random(8))) == 20
        running.process.send_signal(signal.SIGCONT)
        assert ask(control, SHUTDOWN) == bytes(4)
        assert running.ended() == 0
    assert not (place / "pid").exists()
    shown = host.show(vtpm)
    assert (shown["state"], shown["guest"]) == ("running", "guest"), "it stays attached, for the next QEMU"
    assert alive(shown["pid"])
    guest = Guest(shown["tcti"].removeprefix("swtpm:path="))
    assert guest.transmit(tpm.get_random(8)) == NOT_RUNNING
    guest.close()


@pytest.mark.parametrize(("ending", "option", "control"), [("hang-up", "-t", ""), ("hang-up", "", ",terminate")])
def test_it_ends_with_its_qemu_where_that_is_asked_for(
    host: Installation, place: Path, ending: str, option: str, control: str
) -> None:
    vtpm = given(host)
    running = Running(place, words_for(host, vtpm, "--tpm2", *filter(None, [option])), control=control)
    if option:
        with running.connect() as asking:  # as swtpm_ioctl does, who is no QEMU
            assert ask(asking, GET_CAPABILITY)[:4] == bytes(4)
    with running.connect() as qemu:
        data = data_connection(qemu)
        assert ask(qemu, INIT, bytes(4)) == bytes(4)
    data.close()
    assert running.ended() == 0


def test_the_vtpm_is_switched_off_when_it_is_told_to_end(host: Installation, place: Path) -> None:
    vtpm = given(host)
    running = Running(place, words_for(host, vtpm, "--tpm2", "--flags", "startup-clear"))
    guest = Guest(str(host.runtime / "vtpm" / vtpm / "swtpm.sock"))
    wait_for(lambda: len(guest.transmit(tpm.get_random(8))) == 20, "the TPM to be started up")
    running.process.send_signal(signal.SIGTERM)
    assert running.ended() == 0
    assert guest.transmit(tpm.get_random(8)) == NOT_RUNNING
    guest.close()


@pytest.mark.parametrize("kind", ["unixio", "tcp"])
def test_programs_reach_the_tpm_by_the_data_channel(host: Installation, place: Path, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    where = f"type=unixio,path={place}/data" if kind == "unixio" else f"type=tcp,port={port}"
    vtpm = given(host)
    words = words_for(host, vtpm, "--tpm2", "--flags", "startup-clear", "--server", where, "--daemon")
    subprocess.run(as_user(OWNER, [*words, "--pid", f"file={place}/pid"]), check=True, timeout=60)
    for _ in range(3):  # a daemon that said it is ready takes clients, one after the other
        address = str(place / "data") if kind == "unixio" else ("127.0.0.1", port)
        with socket.socket(socket.AF_UNIX if kind == "unixio" else socket.AF_INET) as data:
            data.connect(address)
            assert len(say(data, tpm.get_random(8))) == 20
    pid = int((place / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid), "the daemon's end")
    assert sorted(place.iterdir()) == []


def test_passed_sockets_are_served(host: Installation) -> None:
    """As swtpm_setup starts it: ends of socket pairs for both channels."""
    vtpm = given(host)
    (control, theirs), (data, also_theirs) = socket.socketpair(), socket.socketpair()
    words = words_for(host, vtpm, "--tpm2", "--flags", "not-need-init,startup-clear")
    words += ["--ctrl", f"type=unixio,clientfd={theirs.fileno()}", "--server", f"type=tcp,fd={also_theirs.fileno()}"]
    with control, data:
        with theirs, also_theirs:
            process = subprocess.Popen(as_user(OWNER, words), pass_fds=(theirs.fileno(), also_theirs.fileno()))
        control.settimeout(30)
        data.settimeout(30)
        assert b'"family":"2.0"' in ask(control, GET_INFO, struct.pack(">QII", 1, 0, 0))
        assert len(say(data, tpm.get_random(8))) == 20
        assert ask(control, SHUTDOWN) == bytes(4)
    assert process.wait(30) == 0


def test_swtpm_setup_provisions_a_managed_vtpm(host: Installation, place: Path) -> None:
    vtpm = given(host)
    ours = [str(BIN / "vtpm-swtpm"), *words_for(host, vtpm, "--manager-ignore-tpmstate")[1:]]
    words = ["swtpm_setup", "--tpm2", "--tpm", " ".join(ours), "--tpmstate", str(place), "--createek", "--overwrite"]
    done = subprocess.run(as_user(OWNER, words), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(place.iterdir()) == [], "no state was made beside the manager's"
    with qemu(str(host.runtime / "vtpm" / vtpm / "swtpm.sock.ctrl")) as machine:
        assert tpm.rc(say(machine.data, READ_EK)) == 0


def test_it_listens_before_its_vtpm_has_answered(host: Installation, place: Path) -> None:
    """libvirt gives it a second; a vTPM that has to wake, or is busy, may take longer."""
    vtpm = given(host)
    instance = host.show(vtpm)["pid"]
    os.kill(instance, signal.SIGSTOP)
    try:
        running = Running(place, words_for(host, vtpm, "--tpm2"))
        control = running.connect()
    finally:
        os.kill(instance, signal.SIGCONT)
    with control:
        assert ask(control, GET_CAPABILITY)[:4] == bytes(4)
        assert ask(control, SHUTDOWN) == bytes(4)
    assert running.ended() == 0


def test_a_second_command_is_refused_and_takes_nothing_from_the_first(host: Installation, place: Path) -> None:
    vtpm = given(host)
    running = Running(place, words_for(host, vtpm, "--tpm2"))
    with running.connect() as control, data_connection(control) as data:
        assert ask(control, INIT, bytes(4)) == bytes(4)
        code, text = refused(OWNER, words_for(host, vtpm, "--tpm2", "--ctrl", f"type=unixio,path={place}/other"))
        assert code == ExitCode.BUSY
        assert "in use by another" in text
        assert tpm.rc(say(data, STARTUP)) == 0
        assert ask(control, SHUTDOWN) == bytes(4)
    assert running.ended() == 0


def test_a_service_manager_is_told_when_it_is_ready(host: Installation, place: Path) -> None:
    vtpm = given(host)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(place / "notify"))
        (place / "notify").chmod(0o666)
        systemd.settimeout(30)
        os.environ["NOTIFY_SOCKET"] = str(place / "notify")
        try:
            running = Running(place, words_for(host, vtpm, "--tpm2"))
        finally:
            del os.environ["NOTIFY_SOCKET"]
        assert systemd.recv(64) == b"READY=1"
    running.process.send_signal(signal.SIGTERM)
    assert running.ended() == 0


def test_what_goes_wrong_is_in_the_log_and_told_to_whoever_started_it(host: Installation, place: Path) -> None:
    words = words_for(host, given(host), "--tpm2", "--log", f"file={place}/log", "--ctrl", "type=unixio,path=/no/where")
    code, text = refused(OWNER, words)
    assert code == ExitCode.FAILURE
    assert "cannot listen at /no/where" in text
    assert "cannot listen at /no/where" in (place / "log").read_text()


# who may


def test_a_vtpm_that_was_given_to_another_is_refused(host: Installation, place: Path) -> None:
    vtpm = given(host)
    code, text = refused(OTHER, words_for(host, vtpm, "--tpm2", "--ctrl", f"type=unixio,path={place}/ctrl"))
    assert code == ExitCode.DENIED
    assert "was not given to this user" in text
    with socket.socket(socket.AF_UNIX) as direct, effectively(OTHER), pytest.raises(PermissionError):
        direct.connect(str(host.runtime / "vtpm" / vtpm / "swtpm.sock.ctrl"))


@pytest.mark.parametrize("folder", ["run", "run/vtpm"])
def test_folders_above_the_sockets_let_through_and_show_nothing(host: Installation, folder: str) -> None:
    vtpm = given(host)
    path = host.base / folder
    for uid, allowed in ((OWNER, True), (OTHER, False)):
        listing = subprocess.run(as_user(uid, ["ls", str(path)]), capture_output=True, check=False)
        assert listing.returncode != 0, "it can be listed"
        socket_there = ["test", "-S", str(host.runtime / "vtpm" / vtpm / "swtpm.sock.ctrl")]
        assert (subprocess.run(as_user(uid, socket_there), check=False).returncode == 0) is allowed
        made = subprocess.run(as_user(uid, ["touch", str(path / "mine")]), capture_output=True, check=False)
        assert made.returncode != 0, "somebody can put something there"


@pytest.mark.parametrize("verb", sorted(BY_NAME))
def test_being_given_a_vtpm_is_no_role(host: Installation, shared: str, verb: str) -> None:
    with effectively(OWNER), pytest.raises(RemoteError) as caught:
        request(str(host.runtime / "admin.sock"), verb, {"vtpm": shared})
    assert caught.value.exit_code is ExitCode.DENIED


def test_one_that_is_not_attached_is_not_had_without_a_role(host: Installation, place: Path) -> None:
    vtpm = host.add("unattached")
    words = ["--tpm2", "--ctrl", f"type=unixio,path={place}/ctrl"]
    code, text = refused(OWNER, words_for(host, vtpm, *words))
    assert code == ExitCode.DENIED
    assert f"--owner {OWNER}" in text
    code, text = refused(OWNER, words_for(host, "unattached", *words))
    assert code == ExitCode.DENIED
    assert "by its UUID" in text
    assert host.show(vtpm)["state"] == "added"


def test_an_operator_has_it_attached_and_detached(host: Installation, place: Path) -> None:
    vtpm = host.add("on-demand")
    running = Running(place, words_for(host, "on-demand", "--tpm2", "--guest", "g7"), uid=0)
    shown = host.show(vtpm)
    assert (shown["state"], shown["frontend"], shown["owner"], shown["guest"]) == ("running", "qemu", "0:0", "g7")
    with running.connect() as control:
        assert ask(control, SHUTDOWN) == bytes(4)
    assert running.ended() == 0
    assert host.show(vtpm)["guest"] is None
    running = Running(place, words_for(host, vtpm, "--tpm2"), uid=0)
    running.process.kill()  # nobody detaches it, and the next one finds it attached
    running.process.wait()
    running = Running(place, words_for(host, vtpm, "--tpm2"), uid=0)
    with running.connect() as control:
        assert ask(control, SHUTDOWN) == bytes(4)
    assert running.ended() == 0
    assert host.show(vtpm)["frontend"] == "qemu"


# what is refused


def test_an_attachment_for_programs_is_not_taken_for_qemus(host: Installation, place: Path) -> None:
    vtpm = given(host, frontend="socket")
    code, text = refused(OWNER, words_for(host, vtpm, "--tpm2", "--ctrl", f"type=unixio,path={place}/ctrl"))
    assert code == ExitCode.CONFLICT
    assert "--frontend qemu" in text


def test_a_family_that_is_another_is_refused(host: Installation, place: Path) -> None:
    control = ["--ctrl", f"type=unixio,path={place}/ctrl"]
    assert refused(OWNER, words_for(host, given(host), *control))[0] == ExitCode.CONFLICT  # without --tpm2: 1.2
    assert refused(OWNER, words_for(host, given(host, "--tpm", "1.2"), "--tpm2", *control))[0] == ExitCode.CONFLICT
    unattached = host.add("wrong-family", "--tpm", "1.2")
    (place / "pid").write_text("1\n")
    code, _ = refused(0, words_for(host, unattached, "--tpm2", *control, "--pid", f"file={place}/pid"))
    assert code == ExitCode.CONFLICT
    assert host.show(unattached)["guest"] is None, "what was attached for it is detached again"
    assert (place / "pid").read_text() == "1\n", "another command's: this one had written none"


def test_a_socket_that_its_owner_removed_is_told_and_keeps_nothing_attached(host: Installation, place: Path) -> None:
    vtpm = host.add("removed-socket")
    running = Running(place, words_for(host, vtpm, "--tpm2"), uid=0)
    with running.connect() as control:
        assert ask(control, GET_CAPABILITY)[:4] == bytes(4)
        folder = host.runtime / "vtpm" / vtpm
        (folder / "swtpm.sock.ctrl").unlink()
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0
    assert host.show(vtpm)["guest"] is None, "it was attached for this command alone"
    host.attach(vtpm, "guest", "--frontend", "qemu")
    (folder / "swtpm.sock").unlink()
    near, far = socket.socketpair()
    words = words_for(host, vtpm, "--tpm2", "--server", f"type=tcp,fd={far.fileno()}")
    with near, far:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, pass_fds=(far.fileno(),))
    assert done.returncode == ExitCode.NOT_FOUND, done.stderr
    assert "Traceback" not in done.stderr
    assert "swtpm.sock" in done.stderr


@pytest.mark.parametrize(
    "more",
    [
        ("--tpmstate", "dir=/nowhere"),
        ("--key", "file=/nowhere"),
        ("--key", "pwdfile=/nowhere"),
        ("--migration-key", "file=/nowhere"),
        ("--manager-ignore-tpmstate", "--key", "file=/nowhere"),
        ("--locality", "allow-set-locality"),
        ("--pcap", "file=/nowhere"),
        ("-p", "12345"),
        (),
    ],
)
def test_what_a_managed_vtpm_does_not_have_is_an_error(host: Installation, more: tuple[str, ...]) -> None:
    code, _ = refused(OWNER, words_for(host, str(uuid4()), "--tpm2", *more))
    assert code == ExitCode.USAGE


def means(*words: str, **environment: str) -> str:
    return wanted(parse(Interface.SOCKET, ["--manager", *words], environment), environment)


def test_which_vtpm_a_command_line_means() -> None:
    uuid = str(UUID(int=7))
    state = ("--tpmstate", f"dir=/var/lib/libvirt/swtpm/{uuid.upper()}/tpm2,mode=0600", "--manager-ignore-tpmstate")
    assert means("--vtpm", "web", VTPM_SWTPM_VTPM="other") == "web"
    assert means(VTPM_SWTPM_VTPM="other") == "other"
    assert means(*state) == uuid
    assert means("--vtpm", "web", *state) == "web"
    with pytest.raises(UsageError, match="which vTPM"):
        means()
    with pytest.raises(UsageError, match="which vTPM"):
        means("--tpmstate", "dir=/var/lib/tpm", "--manager-ignore-tpmstate")

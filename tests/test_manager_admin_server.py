"""The admin socket against clients that are wrong, slow, many, or nobody; roles; sockets and who owns them."""

import dataclasses
import os
import random
import shutil
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import trio
from descriptor_leaks import open_descriptors

from frontend_backend.descriptors import MAX_DATAGRAM, PeerCredentials, send_message
from frontend_backend.messages_admin import AdminRequest, Done, ExitCode, Failure, Row, decode_admin, encode_admin
from manager import admin_server
from manager.admin_server import AdminServer, check_arguments, role_of
from manager.config import AdminConfig, Config, Layout
from manager.errors import ConfigurationError, ConflictError, ManagerError, UsageError
from manager.services import Services
from manager.sockets import Owner, SocketFolder, parse_mode
from manager.verb_table import BY_NAME, Role
from manager.verbs import HANDLERS
from storage.errors import NameTaken, NoSuchRow


@dataclass
class Admin:
    path: Path
    statuses: list[dict[str, Any]]

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setblocking(False)
        try:
            sock.connect(str(self.path))
        except OSError:
            sock.close()
            raise
        return sock

    async def patient_connect(self) -> socket.socket:
        """Connect as a client does: where the queue is full it waits."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(10)
        await trio.to_thread.run_sync(sock.connect, str(self.path))
        sock.setblocking(False)
        return sock

    async def talk(self, data: bytes, descriptors: tuple[int, ...] = ()) -> list[Any]:
        """Send one datagram and return every answer until the end."""
        with await self.patient_connect() as sock:
            send_message(sock, data, descriptors)
            return await answers(sock)

    async def ask(self, verb: str, **arguments: Any) -> list[Any]:
        return await self.talk(encode_admin(AdminRequest(verb, arguments)))


async def no_upgrade() -> dict[str, Any]:
    raise ConflictError("not in this test")


async def answers(sock: socket.socket) -> list[Any]:
    received: list[Any] = []
    with trio.fail_after(10):
        while True:
            await trio.lowlevel.wait_readable(sock)
            data = sock.recv(MAX_DATAGRAM)
            if not data:
                return received
            received.append(decode_admin(data))


def services_in(folder: Path, status: Callable[[], dict[str, Any]]) -> Services:
    """Services of which only these parts are there: the socket's side of the server asks for no other."""
    absent: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Services))
    layout = Layout(folder, folder)
    there = {"sockets": folder, "status": status, "layout": layout, "config": Config(), "upgrade": no_upgrade}
    return Services(**absent | there)


@asynccontextmanager
async def admin(config: AdminConfig | None = None) -> AsyncIterator[Admin]:
    folder = tempfile.mkdtemp(prefix="vt")  # short: a socket's path has at most 107 bytes
    path = Path(folder) / "admin.sock"
    made = Admin(path, [{"schema": 1, "pid": 1}])
    settings = config or AdminConfig()
    services = services_in(path.parent, lambda: made.statuses[0])
    try:
        with admin_server.listen(path, settings) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(AdminServer(services, settings).run, listener)
                yield made
                nursery.cancel_scope.cancel()
    finally:
        shutil.rmtree(folder)


def refused(received: list[Any]) -> Failure:
    (failure,) = received
    assert isinstance(failure, Failure)
    return failure


# --- messages -------------------------------------------------------------------------------------


async def test_a_verb_is_answered_by_rows_and_done() -> None:
    async with admin() as made:
        assert await made.ask("status") == [Row({"schema": 1, "pid": 1}), Done()]


async def test_garbage_is_answered_and_the_next_is_served() -> None:
    good = encode_admin(AdminRequest("status", {}))
    rng = random.Random(1)
    async with admin() as made:
        before = open_descriptors()
        for _ in range(150):
            data = bytearray(good)
            match rng.randrange(3):
                case 0:
                    data = bytearray(rng.randbytes(rng.randrange(1, 300)))
                case 1:
                    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
                case 2:
                    del data[rng.randrange(1, len(data)) :]
            last = (await made.talk(bytes(data)))[-1]
            assert isinstance(last, Failure | Done)
        assert refused(await made.talk(encode_admin(Done()))).code is ExitCode.USAGE
        assert (await made.ask("status"))[-1] == Done()
        assert open_descriptors() == before


async def test_an_oversized_request_is_refused() -> None:
    async with admin() as made:
        with made.connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            sock.send(b"x" * (MAX_DATAGRAM + 1))
            assert "malformed" in refused(await answers(sock)).text


async def test_descriptors_that_do_not_belong_are_closed() -> None:
    async with admin() as made:
        before = open_descriptors()
        request = encode_admin(AdminRequest("status", {}))
        assert (await made.talk(request, (0, 0, 0)))[-1] == Done()
        assert refused(await made.talk(request, (0,) * 20)).code is ExitCode.USAGE
        assert refused(await made.talk(b"\xc1", (0,))).code is ExitCode.USAGE
        assert open_descriptors() == before


async def test_a_client_that_goes_away_at_any_moment_costs_nothing() -> None:
    async with admin() as made:
        before = open_descriptors()
        for step in range(30):
            with made.connect() as sock:
                if step % 3:
                    sock.send(encode_admin(AdminRequest("status", {})))
                if step % 2:
                    await trio.lowlevel.checkpoint()
        assert (await made.ask("status"))[-1] == Done()
        assert open_descriptors() == before


async def test_a_silent_client_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_server, "_REQUEST_SECONDS", 0.05)
    async with admin() as made:
        with made.connect() as sock:
            assert refused(await answers(sock)).code is ExitCode.BUSY


async def test_clients_that_do_not_speak_or_read_keep_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_server, "_MAX_CLIENTS", 3)
    monkeypatch.setattr(admin_server, "_REQUEST_SECONDS", 0.1)
    monkeypatch.setattr(admin_server, "_REPLY_SECONDS", 0.1)
    async with admin() as made:
        made.statuses[0] = {"schema": 1, "long": "x" * 100_000}
        monkeypatch.setitem(HANDLERS, "status", many)
        deaf = [await made.patient_connect() for _ in range(3)]
        for sock in deaf:
            sock.send(encode_admin(AdminRequest("status", {})))
        mute = [await made.patient_connect() for _ in range(3)]
        monkeypatch.setitem(HANDLERS, "list", few)
        assert (await made.ask("list"))[-1] == Done()
        for sock in (*deaf, *mute):
            sock.close()


async def many(services: Services, *_: Any) -> list[dict[str, Any]]:
    return [services.status()] * 100


async def few(*_: Any) -> list[dict[str, Any]]:
    return [{"schema": 1}]


async def test_those_who_wait_cost_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin_server, "_MAX_CLIENTS", 4)
    async with admin() as made:
        monkeypatch.setattr(admin_server, "_MAX_CLIENTS", 64)
        waiting = []
        before = len(open_descriptors())
        for _ in range(8):
            try:
                waiting.append(made.connect())
            except BlockingIOError:
                break  # the backlog is full: the kernel keeps them out
            await trio.testing.wait_all_tasks_blocked()
        assert len(open_descriptors()) - before <= len(waiting) + 4
        for sock in waiting:
            sock.close()


@pytest.mark.parametrize(
    ("error", "code"),
    [(NoSuchRow("vTPM web"), ExitCode.NOT_FOUND), (NameTaken("the name web"), ExitCode.CONFLICT)],
)
async def test_who_comes_second_of_two_at_once_is_told_as_if_he_came_later(
    monkeypatch: pytest.MonkeyPatch, error: Exception, code: ExitCode
) -> None:
    """Of two `vtpm-remove` at once one ended with 1, and a traceback in the log."""

    async def outrun(*_: Any) -> list[dict[str, Any]]:
        raise error

    monkeypatch.setitem(HANDLERS, "status", outrun)
    async with admin() as made:
        failure = refused(await made.ask("status"))
        assert (failure.code, "at the same time" in failure.text) == (code, True)


async def test_a_mistake_in_a_verb_ends_one_request(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any) -> list[dict[str, Any]]:
        raise ZeroDivisionError

    monkeypatch.setitem(HANDLERS, "status", broken)
    async with admin() as made:
        assert "ZeroDivisionError" in refused(await made.ask("status")).text
        assert "nobody foresaw" in caplog.text
        monkeypatch.undo()
        assert (await made.ask("status"))[-1] == Done()


async def test_no_line_of_the_log_is_the_callers(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with admin() as made:
        await made.ask("show", vtpm="x\nERROR forged: everything is fine\x1b[2J")
    assert "forged" in caplog.text
    assert not any(line.startswith("ERROR forged") for line in caplog.text.splitlines())
    assert "\x1b" not in "".join(record.getMessage() for record in caplog.records if record.levelname == "INFO")


async def test_a_listener_that_closes_ends_the_accepting_and_serves_who_is_there(
    monkeypatch: pytest.MonkeyPatch, short: Path
) -> None:
    go_on = trio.Event()

    async def slow(*_: Any) -> list[dict[str, Any]]:
        await go_on.wait()
        return [{"schema": 1}]

    monkeypatch.setitem(HANDLERS, "status", slow)
    made = Admin(short / "a", [])
    services = services_in(short, dict)
    listener = admin_server.listen(made.path, AdminConfig())
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(AdminServer(services, AdminConfig()).run, listener)
            with made.connect() as sock:
                sock.send(encode_admin(AdminRequest("status", {})))
                await trio.testing.wait_all_tasks_blocked(0.01)
                trio.lowlevel.notify_closing(listener)
                listener.close()
                near, far = socket.socketpair()  # takes the listener's number
                with near, far:
                    with trio.move_on_after(0.01):
                        await trio.lowlevel.wait_readable(near)
                go_on.set()
                assert (await answers(sock))[-1] == Done()


# --- who may --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uid", "role"),
    [
        (0, Role.ADMINISTRATOR),
        (os.geteuid(), Role.ADMINISTRATOR),
        (500, Role.OPERATOR),
        (600, Role.AUDITOR),
        (700, None),
        (2**32 - 2, None),
    ],
)
def test_a_peer_has_the_role_that_the_configuration_gives(uid: int, role: Role | None) -> None:
    config = AdminConfig(operator_uids=(500,), auditor_uids=(600, 500))
    assert role_of(PeerCredentials(1, uid, 0), config) is role


@pytest.mark.parametrize("verb", sorted(BY_NAME))
async def test_every_verb_is_denied_to_the_role_below_and_to_nobody(monkeypatch: pytest.MonkeyPatch, verb: str) -> None:
    below = [role for role in (None, *Role) if role is None or role < BY_NAME[verb].role]
    async with admin() as made:
        for role in below:
            monkeypatch.setattr(admin_server, "role_of", lambda *_, role=role: role)
            assert refused(await made.ask(verb)).code is ExitCode.DENIED


def test_only_looking_is_for_auditors_and_only_administrators_make_and_unmake() -> None:
    assert {name for name, verb in BY_NAME.items() if verb.role is Role.AUDITOR} == {
        "event-log",
        "events",
        "group-list",
        "group-predict",
        "group-show",
        "list",
        "migrate-list",
        "show",
        "status",
        "tpm-status",
        "verify",
    }
    for name in (
        "add",
        "remove",
        "reset",
        "allow-restore",
        "stop",
        "group-add",
        "group-update",
        "group-rotate",
        "group-remove",
    ):
        assert BY_NAME[name].role is Role.ADMINISTRATOR


async def test_an_unknown_verb_is_a_usage_error() -> None:
    async with admin() as made:
        assert refused(await made.ask("reboot")).code is ExitCode.USAGE


def test_every_verb_has_a_handler_help_and_known_kinds() -> None:
    assert set(HANDLERS) == set(BY_NAME)
    for verb in BY_NAME.values():
        assert verb.help
        assert all(argument.help for argument in verb.arguments)
        known = {"str", "int", "flag", "path", "text", "bytes", "list", "measurements"}
        assert {argument.kind for argument in verb.arguments} <= known


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"vtpm": None, "guest": "g"},
        {"vtpm": 1, "guest": "g"},
        {"vtpm": ("v",), "guest": "g"},
        {"vtpm": "v", "guest": True},
        {"vtpm": "v", "guest": "g", "frontend": "floppy"},
        {"vtpm": "v", "guest": "g", "colour": "red"},
        {"vtpm": "v", "guest": "g", "mode": 660},
    ],
)
def test_arguments_are_exactly_those_of_the_table(arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        check_arguments(BY_NAME["attach"], arguments)


@pytest.mark.parametrize(
    ("verb", "arguments", "said"),
    [
        ("attach", {"vtpm": "v", "guest": "g", "owner": ""}, "--owner is given, but empty"),
        ("group-add", {"name": "g", "pcrs": ""}, "--pcrs is given, but empty"),
        ("group-add", {"name": "g", "recovery": ""}, "the file that --recovery names is empty"),
        ("group-add", {"name": "g", "saa": ""}, "the file that --saa names is empty"),
        ("group-update", {"group": "g", "recovery": ""}, "the file that --recovery names is empty"),
        ("migrate-authorise", {"peer": "p", "leave": "web1", "address": ""}, "--address is given, but empty"),
    ],
)
def test_what_is_empty_is_not_taken_for_the_default(verb: str, arguments: dict[str, Any], said: str) -> None:
    """A tenant's recovery key from a file that was cut short must not become the installation's."""
    with pytest.raises(UsageError, match=f"{said}: that is not the default"):
        check_arguments(BY_NAME[verb], arguments)


def test_defaults_fill_what_is_not_said() -> None:
    checked = check_arguments(BY_NAME["attach"], {"vtpm": "v", "guest": "g"})
    assert checked == {
        "vtpm": "v",
        "guest": "g",
        "frontend": "socket",
        "owner": None,
        "mode": None,
        "startup": None,
        "tcp": None,
        "hwinitpcrs": None,
        "measure": (),
        "hibernate": None,
        "commands_per_second": None,
        "saves_per_second": None,
        "nv_bytes": None,
        **dict.fromkeys(("compat", "domain", "instance_domain", "localities", "xsm_label")),
        **dict.fromkeys(("maintenance", "trace"), False),
    }
    with pytest.raises(UsageError):
        check_arguments(BY_NAME["remove"], {"vtpm": "v", "yes": 1})


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short name: a socket's path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vt") as made:
        yield Path(made)


# --- sockets --------------------------------------------------------------------------------------


def test_the_admin_socket_has_its_mode_before_anybody_can_connect(short: Path) -> None:
    path = short / "a"
    with admin_server.listen(path, AdminConfig(socket_mode="0640")):
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
    for bad in (AdminConfig(socket_mode="rw"), AdminConfig(socket_group="no-such-group-here")):
        with pytest.raises(ConfigurationError):
            admin_server.listen(path, bad)
    with pytest.raises(ConfigurationError, match="cannot make"):
        admin_server.listen(short / "nowhere" / "a", AdminConfig())


@pytest.mark.parametrize(
    "text",
    [
        "no-such-user-here",
        ":",
        "4294967295",
        "9" * 30,
        "0:4294967295",
        "0:no-such-group",
        "a\0b",
        "-1",
    ],
)
def test_an_owner_that_nobody_is_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Owner.parse(text, 0)


def test_an_owner_is_a_user_with_its_group_or_another() -> None:
    assert Owner.parse("0", 5) == Owner(0, 0)
    assert Owner.parse("root:12", 5) == Owner(0, 12)
    assert Owner.parse("54321", 5) == Owner(54321, 54321)
    assert Owner.parse(None, 54321).uid == 54321


@pytest.mark.parametrize("text", ["", "9", "1000", "rw-", "-1", "07777"])
def test_a_mode_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_mode(text)
    assert parse_mode("0660") == 0o660


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give sockets away")
def test_sockets_are_made_where_their_owner_cannot_reach_yet(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Owner(54321, 54321)
    folder = SocketFolder(short, uuid4(), "socket")
    secret = short / "shadow"
    secret.write_text("root's")
    given: list[str] = []
    real = os.chown

    def chown(path: Any, uid: int, gid: int, **more: Any) -> None:
        if str(path).endswith((".sock", ".ctrl")):
            status = folder.path.stat()
            assert (status.st_uid, stat.S_IMODE(status.st_mode)) == (0, 0o700), "its owner could swap a link in"
            given.append(str(path))
        real(path, uid, gid, **more)

    monkeypatch.setattr(os, "chown", chown)
    for _ in range(2):  # the second time the folder belongs to the owner already
        for sock in folder.listen(owner, 0o600):
            sock.close()
        assert folder.path.stat().st_uid == owner.uid
        folder.endpoint.unlink()
        folder.endpoint.symlink_to(secret)  # as its owner may
    assert len(given) == 4
    for sock in folder.listen(owner, 0o660):
        sock.close()
    assert secret.stat().st_uid == 0
    assert not folder.endpoint.is_symlink()
    folder.remove()
    assert not folder.path.exists()


@pytest.mark.parametrize(("mode", "folder_mode"), [(0o600, 0o700), (0o660, 0o750), (0o666, 0o755), (0o606, 0o705)])
def test_who_may_use_a_socket_may_pass_its_folder(short: Path, mode: int, folder_mode: int) -> None:
    folder = SocketFolder(short, uuid4(), "ring")
    for sock in folder.listen(Owner(os.geteuid(), os.getegid()), mode):
        assert sock.type is socket.SOCK_SEQPACKET
        sock.close()
    assert stat.S_IMODE(folder.path.stat().st_mode) == folder_mode
    assert stat.S_IMODE(folder.endpoint.stat().st_mode) == mode


def test_a_folder_that_cannot_be_made_starts_nothing(short: Path) -> None:
    (short / "file").write_text("")
    with pytest.raises(ManagerError, match="nothing was started"):
        SocketFolder(short / "file", uuid4(), "socket").listen(Owner(0, 0), 0o600)

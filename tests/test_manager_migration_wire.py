import os
import socket
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import trio
import trio.testing

from frontend_backend import messages_migration as m
from manager.errors import BusyError, ConfigurationError, DeniedError, ManagerError, UsageError
from manager.migration_identity import make, parse_certificate, tls_context
from manager.migration_wire import (
    MAX_CONNECTIONS,
    MAX_REQUESTS,
    Address,
    MigrationServer,
    ask,
    listen,
    parse_address,
)
from manager.strangers import MAX_STRANGERS, Strangers, source_of

OURS, FRIEND, STRANGER = make(uuid4()), make(uuid4()), make(uuid4())
REQUEST = m.Renounce(b"v" * 16, b"e" * 16)


def fingerprint(identity: object) -> str:
    return parse_certificate(identity.certificate)[1]  # type: ignore[attr-defined]


class Other:
    """A manager that notes who asked."""

    def __init__(self, address: Address) -> None:
        self.address, self.asked = address, list[tuple[str, m.MigrationRequest]]()
        self.pinned, self.known = [FRIEND.certificate], {fingerprint(FRIEND)}
        self.free = trio.Event()
        self.free.set()

    def context(self) -> ssl.SSLContext | None:
        return tls_context(OURS, self.pinned, server=True)

    async def handle(self, who: str, request: m.MigrationRequest) -> m.MigrationReply:
        self.asked.append((who, request))
        await self.free.wait()
        return m.RenounceReply()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vt") as made:
        yield Path(made)


@asynccontextmanager
async def serving(address: Address, patience: float = 20.0) -> AsyncIterator[Other]:
    other = Other(address)
    listener = listen(address)
    server = MigrationServer(other.context, other.known.__contains__, other.handle, patience)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, listener)
        yield other
        nursery.cancel_scope.cancel()
    listener.close()


async def asks(other: Other, identity: object = FRIEND, pinned: object = OURS) -> m.MigrationReply:
    context = tls_context(identity, [pinned.certificate], server=False)  # type: ignore[arg-type, attr-defined]
    return await ask(other.address, context, fingerprint(pinned), REQUEST)


async def test_a_paired_manager_is_answered_over_a_unix_socket_that_is_ours_alone(folder: Path) -> None:
    async with serving(Address(path=folder / "m")) as other:
        assert await asks(other) == m.RenounceReply()
        assert other.asked == [(fingerprint(FRIEND), REQUEST)]
        assert (folder / "m").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_paired_manager_is_answered_over_tcp(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip(f"this machine has no {host}")
    async with serving(Address(host=host, port=port)) as other:
        assert await asks(other) == m.RenounceReply()


async def test_nobody_else_is_heard(folder: Path) -> None:
    async with serving(Address(path=folder / "m")) as other:
        with pytest.raises(ManagerError, match="certificate"):
            await asks(other, STRANGER)
        with pytest.raises(DeniedError, match="certificate"):
            await asks(other, FRIEND, pinned=STRANGER)
        bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no certificate at all
        bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
        with pytest.raises(ManagerError, match="certificate"):
            await ask(other.address, bare, fingerprint(OURS), REQUEST)
        old = tls_context(FRIEND, [OURS.certificate], server=False)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
        with pytest.raises(ManagerError):
            await ask(other.address, old, fingerprint(OURS), REQUEST)
        assert other.asked == []
        other.pinned = [STRANGER.certificate]  # revoked: the next connection knows
        with pytest.raises(ManagerError, match="certificate"):
            await asks(other)
        assert other.asked == []
        other.pinned = [FRIEND.certificate]
        assert await asks(other) == m.RenounceReply()


async def test_a_certificate_that_a_peer_signed_is_not_the_peer(folder: Path) -> None:
    """A pinned certificate is no authority, though OpenSSL is told to trust it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    key = serialization.load_der_private_key(FRIEND.key, None)
    theirs = x509.load_pem_x509_certificate(STRANGER.certificate.encode())
    issuer = x509.load_pem_x509_certificate(FRIEND.certificate.encode())
    builder = x509.CertificateBuilder(issuer.subject, theirs.subject, theirs.public_key(), 7)
    builder = builder.not_valid_before(theirs.not_valid_before_utc).not_valid_after(theirs.not_valid_after_utc)
    signed = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    forged = type(STRANGER)(STRANGER.key, signed.public_bytes(serialization.Encoding.PEM).decode())
    async with serving(Address(path=folder / "m")) as other:
        try:
            await asks(other, forged)
        except ManagerError:
            assert other.asked == []
        else:  # who it is is decided by the fingerprint, which is no peer's
            assert other.asked[0][0] != fingerprint(FRIEND)


def silent(folder: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    sock.connect(str(folder / "m"))
    return sock


async def test_those_who_say_nothing_keep_a_place_for_a_time_only(folder: Path) -> None:
    async with serving(Address(path=folder / "m"), patience=0.3):
        with silent(folder) as sock, trio.fail_after(10):
            await trio.lowlevel.wait_readable(sock)
            assert sock.recv(1) == b""


async def test_those_who_say_nothing_and_come_again_keep_nobody_out(folder: Path) -> None:
    """As many as may wait, and a new one for each that is ended."""
    async with serving(Address(path=folder / "m"), patience=600.0) as other, trio.open_nursery() as nursery:

        async def flood() -> None:
            while True:
                with silent(folder) as sock:
                    await trio.lowlevel.wait_readable(sock)
                    await trio.sleep(0.2)

        for _ in range(MAX_STRANGERS + 3):
            nursery.start_soon(flood)
        await trio.sleep(0.2)
        with trio.fail_after(20):
            for _ in range(3):
                assert await asks(other) == m.RenounceReply()
        nursery.cancel_scope.cancel()


async def test_a_flood_from_one_place_ends_its_own_connections() -> None:
    strangers, ended = Strangers(8, 600.0), list[str]()

    async def stranger(source: str) -> None:
        with strangers.one_more(source) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        ended.append(source)

    async with trio.open_nursery() as nursery:
        for source in ("a peer", *["a flood"] * 50, "another peer", *["a flood"] * 50):
            nursery.start_soon(stranger, source)
            await trio.testing.wait_all_tasks_blocked()
        assert ended == ["a flood"] * 94
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", None])
async def test_where_a_connection_comes_from(host: str | None, folder: Path) -> None:
    family = socket.AF_UNIX if host is None else socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener, socket.socket(family) as client:
        try:
            listener.bind(str(folder / "m") if host is None else (host, 0))
        except OSError:
            pytest.skip(f"this machine has no {host}")
        listener.listen()
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        with trio.socket.from_stdlib_socket(accepted) as sock:
            source = {None: f"uid {os.geteuid()}", "127.0.0.1": "127.0.0.1", "::1": "::/64"}[host]
            assert source_of(sock) == source
            assert source_of(sock) == source, "it is looked at, not used up"


async def test_a_managers_requests_wait_for_each_other_and_not_for_another_managers(folder: Path) -> None:
    async with serving(Address(path=folder / "m")) as other, trio.open_nursery() as nursery:
        other.pinned.append(STRANGER.certificate)
        other.known.add(fingerprint(STRANGER))
        other.free = trio.Event()
        for _ in range(MAX_REQUESTS + 3):
            nursery.start_soon(asks, other)
        with trio.fail_after(20):
            while len(other.asked) < MAX_REQUESTS:  # noqa: ASYNC110
                await trio.sleep(0.01)
            nursery.start_soon(asks, other, STRANGER)
            while other.asked[-1][0] != fingerprint(STRANGER):  # noqa: ASYNC110
                await trio.sleep(0.01)
        assert len(other.asked) == MAX_REQUESTS + 1
        other.free.set()
    assert len(other.asked) == MAX_REQUESTS + 4, "who waited was answered"


async def test_a_managers_connections_are_counted(folder: Path) -> None:
    async with serving(Address(path=folder / "m")) as other:
        context = tls_context(FRIEND, [OURS.certificate], server=False)
        held = []
        for _ in range(MAX_CONNECTIONS):
            sock = trio.socket.socket(socket.AF_UNIX)
            await sock.connect(str(folder / "m"))
            stream = trio.SSLStream(trio.SocketStream(sock), context, https_compatible=True)
            await stream.do_handshake()
            held.append(stream)
        await trio.sleep(0.2)  # the last of them has been heard
        reply = await asks(other)
        assert isinstance(reply, m.Refused)
        assert reply.code is m.MigrationRefusal.BUSY
        await trio.aclose_forcefully(held.pop())
        with trio.fail_after(20):
            while await asks(other) != m.RenounceReply():  # noqa: ASYNC110
                await trio.sleep(0.02)
        for stream in held:
            await trio.aclose_forcefully(stream)


async def test_a_message_that_is_none_is_not_read_to_its_end(folder: Path) -> None:
    async with serving(Address(path=folder / "m")) as other:
        context = tls_context(FRIEND, [OURS.certificate], server=False)
        for said, answered in ((b"\xff\xff\xff\xff", False), ((5).to_bytes(4) + b"bytes", True)):
            with trio.socket.socket(socket.AF_UNIX) as sock:
                await sock.connect(str(folder / "m"))
                stream = trio.SSLStream(trio.SocketStream(sock), context, https_compatible=True)
                await stream.send_all(said)
                found = bytes(await stream.receive_some(4096))
                assert bool(found) is answered
                if answered:
                    reply = m.decode_migration_reply(found[4:])
                    assert isinstance(reply, m.Refused)
                    assert reply.code is m.MigrationRefusal.MALFORMED
        assert other.asked == []


async def test_where_nobody_listens_it_is_said(folder: Path) -> None:
    with pytest.raises(BusyError, match="cannot be reached"):
        await asks(Other(Address(path=folder / "nobody")))


def test_addresses_are_written_out() -> None:
    assert parse_address("unix:/run/x") == Address(path=Path("/run/x"))
    assert parse_address("tcp:7443") == Address(host="127.0.0.1", port=7443), "loopback unless written out"
    assert parse_address("tcp:[2001:db8::1]:7443") == Address(host="2001:db8::1", port=7443)
    for text in ("tcp:[::1]:7443", "tcp:192.0.2.1:80", "unix:/a b"):
        assert str(parse_address(text)) == text
    for text in ("", "7443", "tcp:", "tcp:0", "tcp:70000", "tcp:host", "unix:relative", "http://x", "tcp::x"):
        with pytest.raises(UsageError, match="no address"):
            parse_address(text)


def test_an_address_that_cannot_be_listened_at_is_the_configurations_fault(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot listen"):
        listen(Address(path=folder / "missing" / "m"))


def test_only_a_socket_makes_room_for_the_listener(folder: Path) -> None:
    """Whoever writes the wrong path into the configuration loses nothing."""
    other = folder / "config.toml"
    other.write_text("kept")
    with pytest.raises(ConfigurationError, match="no socket, and was left alone; nothing was started"):
        listen(Address(path=other))
    assert other.read_text() == "kept"
    with pytest.raises(ConfigurationError, match="left alone"):
        listen(Address(path=folder))
    for _ in range(2):  # the second time a socket is there whose manager has gone
        listen(Address(path=folder / "m")).close()

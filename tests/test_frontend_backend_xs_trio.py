"""The adapter to xenstore, against Debian's own xenstored and against peers that break its protocol."""

import os
import select
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, closing, suppress
from pathlib import Path
from typing import Self

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from xenstored_rig import Xenstored, running_xenstored

from frontend_backend import xs_trio
from frontend_backend.xen_kernel import XenMissingError
from frontend_backend.xs_connection_trio import Connection
from frontend_backend.xs_link_trio import DeviceLink, default_path
from frontend_backend.xs_session import MAX_CHANGES
from frontend_backend.xs_trio import (
    MAX_TRANSACTIONS,
    MAX_TRIES,
    Permission,
    Transaction,
    Watch,
    Xenstore,
    XenstoreError,
    XenstoreGoneError,
    open_xenstore,
)
from frontend_backend.xs_wire import HEADER, Message, Operation, Splitter, encode_path

SOON = 20.0  # seconds; milliseconds on a quiet machine
Opener = Callable[[], AbstractAsyncContextManager[Xenstore]]


@pytest.fixture(scope="module")
def xenstored() -> Iterator[Xenstored]:
    with running_xenstored() as store:
        yield store


@pytest.fixture(params=["socket", "device"])
def opener(xenstored: Xenstored, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Opener:
    """Both links to the same xenstored: the device's sends what it would write to /dev/xen/xenbus, in a thread."""
    if request.param == "device":

        async def connect(path: str) -> DeviceLink:
            client = socket.socket(socket.AF_UNIX)
            client.connect(path)
            client.setblocking(False)
            return DeviceLink(client.detach(), path)

        monkeypatch.setattr(xs_trio, "connect", connect)
    return lambda: open_xenstore(str(xenstored.socket))


async def next_of(watch: Watch) -> str:
    with trio.fail_after(SOON):
        return await anext(watch)


async def test_nodes_are_written_read_listed_and_removed(opener: Opener) -> None:
    async with opener() as xs:
        assert await xs.read("/nodes/a") is None
        assert await xs.list("/nodes") is None
        assert await xs.permissions("/nodes") is None
        await xs.write("/nodes/a/b", "text é")
        await xs.write("/nodes/c", bytes(range(256)))
        await xs.make("/nodes/d")
        await xs.make("/nodes/d")
        assert await xs.read("/nodes/a/b") == "text é".encode()
        assert await xs.read("/nodes/c") == bytes(range(256))
        assert await xs.read("/nodes/a") == await xs.read("/nodes/d") == b""
        assert sorted(await xs.list("/nodes") or ()) == ["a", "c", "d"]
        assert await xs.list("/nodes/d") == []
        await xs.remove("/nodes")
        await xs.remove("/nodes/x/y")
        assert await xs.read("/nodes/a/b") is None
        assert await xs.is_introduced(0)
        assert not await xs.is_introduced(7)


async def test_a_domain_knows_its_number(opener: Opener) -> None:
    async with opener() as xs:
        await xs.write("domid", "5")  # as libxl does for each domain
        assert await xs.own_domain() == 5
        await xs.remove("domid")


async def test_permissions_are_set_and_told(opener: Opener) -> None:
    wanted = (Permission(0), Permission(7, read=True), Permission(8, read=True, write=True))
    async with opener() as xs:
        await xs.write("/permitted", "x")
        await xs.set_permissions("/permitted", wanted)
        assert await xs.permissions("/permitted") == wanted


async def test_what_xenstored_refuses_is_told_by_name(opener: Opener) -> None:
    async with opener() as xs:
        for path in ("", "/a//b", "/a/", "/a\0b", "/é"):
            with pytest.raises(XenstoreError, match="EINVAL"):
                await xs.read(path)
        with pytest.raises(XenstoreError, match="E2BIG"):
            await xs.write("/big", bytes(4096))
        with pytest.raises(XenstoreError, match="refused to rm /: EINVAL"):
            await xs.remove("/")


@given(st.lists(st.text("aZ0-_/@. \x01\x7f:", min_size=1, max_size=9).filter(lambda path: path[0] != "@")))
@settings(deadline=None, max_examples=30)
def test_our_rules_of_paths_are_xenstoreds(xenstored: Xenstored, paths: list[str]) -> None:
    """Sent past our own check; paths that begin with @ are for watches only."""
    splitter = Splitter()
    with closing(socket.socket(socket.AF_UNIX)) as client:
        client.connect(str(xenstored.socket))
        client.settimeout(SOON)
        for path in paths:
            client.sendall(Message(Operation.READ, 1, 0, path.encode() + b"\0").encode())
            answers: list[Message] = []
            while not answers:
                answers = splitter.feed(client.recv(4096))
            try:
                encode_path(path)
            except XenstoreError:
                assert answers[0].payload == b"EINVAL\0"
            else:
                assert answers[0].payload != b"EINVAL\0"


async def test_a_directory_larger_than_a_message_is_listed(opener: Opener) -> None:
    names = {f"{'n' * 40}{number}" for number in range(300)}
    async with opener() as xs:
        for name in names:
            await xs.write(f"/large/{name}", "")
        listed = await xs.list("/large")
        assert listed is not None
        assert len(listed) == 300
        assert set(listed) == names

        async def body(tx: Transaction) -> int:
            await xs.remove(f"/large/{min(names)}", tx)
            return len(await xs.list("/large", tx) or ())

        assert await xs.transaction(body) == 299
        await xs.remove("/large")


async def test_a_watch_tells_at_once_and_of_every_change_below(opener: Opener) -> None:
    async with opener() as xs, opener() as other:
        watch, sibling = await xs.watch("/watched"), await xs.watch("/watched")
        assert await next_of(watch) == await next_of(sibling) == "/watched"
        await other.write("/watched/a/b", "1")
        assert await next_of(watch) == "/watched/a/b"
        await watch.aclose()
        await watch.aclose()
        with pytest.raises(StopAsyncIteration):
            await next_of(watch)
        await other.remove("/watched")
        assert [await next_of(sibling), await next_of(sibling)] == ["/watched/a/b", "/watched"]
        await sibling.aclose()
        special = await xs.watch("@introduceDomain")
        assert await next_of(special) == "@introduceDomain"


async def test_closing_a_watch_ends_whoever_waits_for_it(opener: Opener) -> None:
    async with opener() as xs:
        watch, seen = await xs.watch("/waited"), list[str]()

        async def listen(*, task_status: trio.TaskStatus[None]) -> None:
            async for path in watch:
                seen.append(path)
                task_status.started()

        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                await nursery.start(listen)
                await watch.aclose()
        assert seen == ["/waited"]


async def test_a_watch_in_a_storm_costs_little_and_misses_nothing(opener: Opener) -> None:
    async with opener() as xs, opener() as other:
        watch = await xs.watch("/storm")
        assert await next_of(watch) == "/storm"
        for _ in range(50):
            await other.write("/storm/same", "x")
        await other.write("/storm/last", "x")
        assert [await next_of(watch), await next_of(watch)] == ["/storm/same", "/storm/last"]
        for number in range(MAX_CHANGES + 5):
            await other.write(f"/storm/{number}", "")
        await xs.read("/storm")  # its answer comes after the events
        assert await next_of(watch) == "/storm"
        await xs.remove("/storm")


async def test_transactions_that_collide_are_run_again_until_each_got_through(opener: Opener) -> None:
    runs = 0
    async with opener() as xs, opener() as other:
        await xs.write("/count", "0")

        async def count(store: Xenstore, tx: Transaction) -> int:
            nonlocal runs
            runs += 1
            value = int(await store.read("/count", tx) or b"")
            await store.write("/count", str(value + 1), tx)
            return value

        async def many(store: Xenstore) -> None:
            for _ in range(5):
                await store.transaction(lambda tx: count(store, tx))

        async with trio.open_nursery() as nursery:
            for store in (xs, other) * 4:
                nursery.start_soon(many, store)
        assert await xs.read("/count") == b"40"
    assert runs > 40


async def test_a_transaction_that_always_collides_gives_up(opener: Opener) -> None:
    runs = 0
    async with opener() as xs:

        async def disturbed(tx: Transaction) -> None:
            nonlocal runs
            runs += 1
            await xs.read("/disturbed", tx)
            await xs.write("/disturbed", str(runs))
            await xs.write("/disturbed", "never", tx)

        with pytest.raises(XenstoreError, match=f"{MAX_TRIES} times over.*EAGAIN"):
            await xs.transaction(disturbed)
        assert runs == MAX_TRIES
        assert await xs.read("/disturbed") == str(MAX_TRIES).encode()


async def test_transactions_that_always_collide_hold_no_other_one_up(opener: Opener) -> None:
    """A guest can disturb ours by writing to its own nodes: as many as may run at once do not keep one more waiting."""
    runs = [0] * (MAX_TRANSACTIONS + 1)
    async with opener() as xs:

        async def disturbed(number: int) -> None:
            async def body(tx: Transaction) -> None:
                runs[number] += 1
                await xs.read(f"/hog/{number}", tx)
                await xs.write(f"/hog/{number}", str(runs[number]))
                await xs.write(f"/hog/{number}", "never", tx)

            await xs.transaction(body)

        async with trio.open_nursery() as nursery:
            for number in range(MAX_TRANSACTIONS + 1):
                nursery.start_soon(disturbed, number)
            await trio.testing.wait_all_tasks_blocked()
            assert await xs.transaction(lambda tx: xs.read("/quiet", tx)) is None
            nursery.cancel_scope.cancel()
        assert max(runs) < MAX_TRIES // 2


async def test_a_transaction_that_ends_otherwise_leaves_nothing(opener: Opener) -> None:
    handles = []
    async with opener() as xs:

        async def fails(tx: Transaction) -> None:
            handles.append(tx)
            await xs.write("/left/failed", "x", tx)
            raise ZeroDivisionError

        async def hangs(tx: Transaction) -> None:
            handles.append(tx)
            await xs.write("/left/cancelled", "x", tx)
            await trio.sleep_forever()

        with pytest.raises(ZeroDivisionError):
            await xs.transaction(fails)
        with trio.move_on_after(0.2):
            await xs.transaction(hangs)
        assert await xs.list("/left") is None
        for tx in handles:
            with pytest.raises(RuntimeError, match="after its end"):
                await xs.read("/left", tx)


async def test_an_operation_cancelled_at_any_moment_leaves_the_connection_whole(opener: Opener) -> None:
    """Values as large as they can be, so that a request cut in the middle would be noticed at once."""
    value = os.urandom(4000)
    async with opener() as xs:

        async def commit(tx: Transaction) -> None:
            await xs.write("/cancelled/b", value, tx)

        async def cut(action: Callable[[], Awaitable[object]], steps: int) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(action)
                for _ in range(steps):
                    await trio.lowlevel.cancel_shielded_checkpoint()
                nursery.cancel_scope.cancel()

        for steps in range(12):
            await cut(lambda: xs.write("/cancelled/a", value), steps)
            await cut(lambda: xs.transaction(commit), steps)
            await cut(lambda: xs.watch("/cancelled"), steps)
            await cut(lambda: xs.read("/cancelled/a"), steps)
        await xs.write("/cancelled/a", value)
        assert await xs.read("/cancelled/a") == value
        watch = await xs.watch("/cancelled")
        assert await next_of(watch) == "/cancelled"
        await xs.transaction(commit)
        assert await next_of(watch) == "/cancelled/b"


async def test_many_tasks_share_a_connection(opener: Opener) -> None:
    async with opener() as xs:

        async def work(number: int) -> None:
            for turn in range(20):
                await xs.write(f"/shared/{number}", f"{number}-{turn}" * 100)
                assert await xs.read(f"/shared/{number}") == f"{number}-{turn}".encode() * 100

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(work, number)


async def test_a_lost_xenstored_is_told_to_everyone_and_the_next_one_found() -> None:
    told = []
    with running_xenstored() as store:
        async with open_xenstore(str(store.socket)) as xs:
            watch = await xs.watch("/gone")
            await next_of(watch)

            async def listen() -> None:
                with pytest.raises(XenstoreGoneError):
                    await anext(watch)
                told.append("watch")

            async def transact() -> None:
                async def body(tx: Transaction) -> None:
                    store.kill()
                    await xs.read("/gone", tx)

                with pytest.raises(XenstoreGoneError, match="has xenstored ended"):
                    await xs.transaction(body)
                told.append("transaction")

            with trio.fail_after(SOON):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(listen)
                    nursery.start_soon(transact)
            with pytest.raises(XenstoreGoneError):
                await xs.write("/gone", "x")
            with pytest.raises(XenstoreGoneError):
                await xs.watch("/gone")
            await watch.aclose()
        assert sorted(told) == ["transaction", "watch"]
        with pytest.raises(XenMissingError, match="nobody answers"):
            await use(str(store.socket))
        store.start()
        async with open_xenstore(str(store.socket)) as xs:
            assert await xs.read("/gone") is None


async def use(path: str) -> None:
    async with open_xenstore(path) as xs:
        await xs.read("/")


async def test_xenstoreds_own_socket_is_domain_0s(xenstored: Xenstored) -> None:
    async with open_xenstore(str(xenstored.socket)) as xs:
        assert await xs.read("domid") is None
        assert await xs.own_domain() == 0


async def test_operations_after_the_block_are_refused_and_its_errors_come_out_as_they_are(opener: Opener) -> None:
    with pytest.raises(ZeroDivisionError):
        async with opener() as xs:
            raise ZeroDivisionError
    with pytest.raises(XenstoreGoneError, match="closed here"):
        await xs.read("/")


async def test_where_there_is_no_xenstore_the_error_says_what_to_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XENSTORED_PATH", str(tmp_path / "none"))
    assert default_path() == str(tmp_path / "none")
    with pytest.raises(XenMissingError, match="start xenstored"):
        async with open_xenstore():
            pass


HOSTILE = {
    "a length beyond the largest": HEADER.pack(Operation.READ, 1, 0, 4097),
    "an answer nobody asked for": Message(Operation.READ, 77, 0, b"").encode(),
    "an answer of another kind": Message(Operation.WRITE, 1, 0, b"OK\0").encode(),
    "an event without a token": Message(Operation.WATCH_EVENT, 0, 0, b"/a\0").encode(),
    "an event without an end": Message(Operation.WATCH_EVENT, 0, 0, b"/a\0001").encode(),
    "half a message": HEADER.pack(Operation.READ, 1, 0, 100) + b"x",
}


class Peer:
    """Sits where xenstored would, for one client, and says what the test wants."""

    def __init__(self, path: Path) -> None:
        self._listener = trio.socket.socket(socket.AF_UNIX)
        self._client = self._listener
        self._path = path
        self._splitter = Splitter()
        self._heard: list[Message] = []

    async def __aenter__(self) -> Self:
        await self._listener.bind(str(self._path))
        self._listener.listen()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        self._client.close()
        self._listener.close()

    async def hear(self) -> Message:
        """Return the client's next request."""
        if self._client is self._listener:
            self._client, _ = await self._listener.accept()
        while not self._heard:
            self._heard += self._splitter.feed(await self._client.recv(65536))
        return self._heard.pop(0)

    async def say(self, *messages: Message | bytes) -> None:
        for message in messages:
            await self._client.send(message.encode() if isinstance(message, Message) else message)

    def hang_up(self) -> None:
        self._client.close()


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_peer_that_breaks_the_protocol_ends_the_connection_for_everyone(tmp_path: Path, name: str) -> None:
    async with Peer(tmp_path / "socket") as peer, trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + SOON

        async def misbehave() -> None:
            asked = await peer.hear()
            assert (asked.operation, asked.request) == (Operation.WATCH, 1)
            await peer.say(HOSTILE[name])
            peer.hang_up()

        nursery.start_soon(misbehave)
        async with open_xenstore(str(tmp_path / "socket")) as xs:
            for _ in range(2):
                with pytest.raises(XenstoreGoneError, match="is lost"):
                    await xs.watch("/a")
            with pytest.raises(XenstoreGoneError, match="is lost"):
                await xs.transaction(lambda tx: xs.read("/a", tx))
    assert not nursery.cancel_scope.cancelled_caught


async def test_a_xenstore_that_never_answers_is_not_waited_for_without_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.02
    path = str(tmp_path / "socket")
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(path)
        listener.listen()
        with trio.fail_after(2 * xs_trio.ANSWER_SECONDS):
            async with open_xenstore(path) as xs:
                with pytest.raises(XenstoreGoneError, match=f"{path} takes .* but gave no answer within 60 s"):
                    await xs.own_domain()


async def test_what_a_cancelled_caller_began_is_ended_when_it_is_answered(tmp_path: Path) -> None:
    async with Peer(tmp_path / "socket") as peer, open_xenstore(str(tmp_path / "socket")) as xs:

        async def never(_tx: Transaction) -> None:
            raise AssertionError

        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(xs.transaction, never)
                nursery.start_soon(xs.watch, "/a")
                start, watch = sorted([await peer.hear(), await peer.hear()], key=lambda one: -one.operation)
                nursery.cancel_scope.cancel()
            unwatch = await peer.hear()
            await peer.say(
                Message(Operation.WATCH, watch.request, 0, b"OK\0"),
                Message(Operation.WATCH_EVENT, 0, 0, watch.payload),
                Message(Operation.TRANSACTION_START, start.request, 0, b"5\0"),
            )
            end = await peer.hear()
    assert (unwatch.operation, unwatch.payload) == (Operation.UNWATCH, watch.payload)
    assert (end.operation, end.transaction, end.payload) == (Operation.TRANSACTION_END, 5, b"F\0")


async def test_a_connection_waits_its_turn_where_many_come_at_once(tmp_path: Path) -> None:
    """xenstored listens with a backlog of one: connect(2) says EAGAIN then, and nobody says when there is room."""
    path, crowd = str(tmp_path / "socket"), []
    with closing(socket.socket(socket.AF_UNIX)) as listener, trio.fail_after(SOON):
        listener.bind(path)
        listener.listen(1)
        with suppress(BlockingIOError):
            while True:
                crowd.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                crowd[-1].connect(path)
        heard: list[Message] = []

        def serve() -> None:
            splitter = Splitter()
            for _ in crowd[:-1]:
                listener.accept()[0].close()
            with closing(listener.accept()[0]) as client:
                while not heard:
                    heard.extend(splitter.feed(client.recv(4096)))
                client.sendall(Message(Operation.READ, heard[0].request, 0, b"mine").encode())
                client.recv(1)

        async with trio.open_nursery() as nursery:

            async def connected() -> None:
                async with open_xenstore(path) as xs:
                    assert await xs.read("/a") == b"mine"

            nursery.start_soon(connected)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(trio.to_thread.run_sync, serve)
    for client in crowd:
        client.close()


async def test_a_watch_that_is_refused_leaves_nothing_and_answers_come_by_number(tmp_path: Path) -> None:
    async with Peer(tmp_path / "socket") as peer, open_xenstore(str(tmp_path / "socket")) as xs:
        got: dict[str, bytes | None] = {}

        async def read(path: str) -> None:
            got[path] = await xs.read(path)

        async def refused() -> None:
            with pytest.raises(XenstoreError, match="quota in xenstore is used up"):
                await xs.watch("/w")

        with trio.fail_after(SOON):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refused)
                watch = await peer.hear()
                await peer.say(Message(Operation.ERROR, watch.request, 0, b"ENOSPC\0"))
            async with trio.open_nursery() as nursery:
                for path in ("/a", "/b", "/c"):
                    nursery.start_soon(read, path)
                asked = [await peer.hear() for _ in range(3)]
                for request in reversed(asked):
                    event = Message(Operation.WATCH_EVENT, request.request, 0, watch.payload)
                    await peer.say(event, Message(Operation.READ, request.request, 0, request.payload[:-1]))
    assert got == {"/a": b"/a", "/b": b"/b", "/c": b"/c"}


async def test_a_descriptor_is_closed_by_the_last_one_who_uses_it() -> None:
    """A write may sit in the kernel when the connection is closed: its descriptor may not become another's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.settimeout(SOON)
    descriptor = ours.detach()
    link = DeviceLink(descriptor, "stuck")
    with closing(theirs):
        with trio.fail_after(SOON), trio.move_on_after(0.1):
            await link.send(bytes(1 << 22))  # more than a socket holds, and nobody reads
        await link.aclose()
        os.fstat(descriptor)  # still open: raises otherwise
        with trio.fail_after(SOON):
            received = 0
            while piece := await trio.to_thread.run_sync(theirs.recv, 1 << 20):
                received += len(piece)
        assert received == 1 << 22  # and an end: the thread closed it
        await link.aclose()
        with pytest.raises(OSError, match="closed"):
            await link.send(b"x")


async def test_a_request_the_kernel_does_not_take_fails_alone() -> None:
    """/dev/xen/xenbus refuses by the write's own error and goes on, as does a socket whose buffer is full."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.settimeout(SOON)
    filled = 0
    with suppress(BlockingIOError):
        while ours.send(b"x"):
            filled += 1
    connection = Connection(DeviceLink(ours.detach(), "datagrams"))
    xs = Xenstore(connection)
    with closing(theirs), trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_requests)
            nursery.start_soon(connection.hand_out_answers)
            with pytest.raises(XenstoreError, match="refused to write /a: EAGAIN"):
                await xs.write("/a", b"value")
            for _ in range(filled):
                assert theirs.recv(1) == b"x"

            async def answer() -> None:
                request = Splitter().feed(await trio.to_thread.run_sync(theirs.recv, 65536))[0]
                theirs.send(Message(Operation.READ, request.request, 0, b"value").encode())

            nursery.start_soon(answer)
            assert await xs.read("/a") == b"value"
            nursery.cancel_scope.cancel()
    await connection.link.aclose()


async def test_a_watch_goes_to_the_kernel_only_when_no_answer_is_due() -> None:
    """Linux's xenbus_dev_frontend.c: a WATCH is written under the mutex that handing out an answer takes.

    Seen under Xen: with an answer due, the write and the kernel's receiving thread wait for each other, for good.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.settimeout(SOON)
    connection = Connection(DeviceLink(ours.detach(), "kernel"))
    xs = Xenstore(connection)
    order: list[tuple[Operation, bool]] = []

    def kernel() -> None:
        first = Splitter().feed(theirs.recv(65536))[0]
        more_before = bool(select.select([theirs], [], [], 0.2)[0])
        order.append((Operation(first.operation), more_before))
        theirs.send(Message(Operation.READ, first.request, 0, b"value").encode())
        for _ in range(4):
            request = Splitter().feed(theirs.recv(65536))[0]
            order.append((Operation(request.operation), False))
            theirs.send(Message(Operation(request.operation), request.request, 0, b"OK\0").encode())

    with closing(theirs), trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.send_requests)
            nursery.start_soon(connection.hand_out_answers)
            async with trio.open_nursery() as askers:
                askers.start_soon(trio.to_thread.run_sync, kernel)
                askers.start_soon(xs.read, "/a")
                await trio.testing.wait_all_tasks_blocked()
                watch = await xs.watch("/b")
                await watch.aclose()
                await xs.read("/c")
                await xs.read("/d")
            nursery.cancel_scope.cancel()
    await connection.link.aclose()
    assert order == [(operation, False) for operation in (
        Operation.READ, Operation.WATCH, Operation.UNWATCH, Operation.READ, Operation.READ
    )]  # fmt: skip

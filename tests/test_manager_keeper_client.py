import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from frontend_backend.messages_keeper import (
    VERSION,
    Description,
    Forget,
    Forgotten,
    HelloReply,
    KeeperRefusal,
    ListReply,
    decode_keeper,
    encode_keeper,
)
from manager import keeper_client
from manager.capacity import descriptor_limit_of
from manager.errors import BusyError, KeeperError
from manager.keeper_client import Keeper

HELLO = encode_keeper(HelloReply(VERSION, 4711))
WHAT = encode_keeper(Description("9.9", 1000, 0))
EMPTY = encode_keeper(ListReply((), 0))
Script = list[list[bytes | None]]  # one list a connection: the answer to each request, None for silence


@contextmanager
def keeper(script: Script) -> Iterator[tuple[Path, list[str]]]:
    """A keeper's socket that answers by the script and notes what it was asked."""
    asked: list[str] = []
    with (
        tempfile.TemporaryDirectory(prefix="vt") as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock,
    ):
        path = Path(folder) / "k"
        sock.bind(str(path))
        sock.listen()
        sock.settimeout(10)

        def serve() -> None:
            for answers in script:
                near, _ = sock.accept()
                with near:
                    if not answers:
                        continue  # it is just ending: the connection is closed before it was taken
                    near.settimeout(10)
                    for answer in answers:
                        data = near.recv(65536)
                        asked.append(type(decode_keeper(data)).__name__)
                        if answer is not None:
                            near.send(answer)
                    near.recv(1)  # until the manager has gone

        thread = threading.Thread(target=serve)
        thread.start()
        yield path, asked
        thread.join(15)
        assert not thread.is_alive()


async def test_an_answer_that_comes_too_late_is_not_that_of_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 0.05)
    with keeper([[HELLO, WHAT, None], [HELLO, WHAT, EMPTY]]) as (path, asked):
        made = await Keeper.connect(path)
        with pytest.raises(KeeperError, match="gave no answer"):
            await made.ask(Forget(bytes(16), 1))
        monkeypatch.setattr(keeper_client, "_ANSWER_SECONDS", 5)
        assert await made.list() == []
        made.close()
    assert asked == ["Hello", "Describe", "Forget", "Hello", "Describe", "List"]


async def test_a_question_that_was_cancelled_leaves_no_answer_behind() -> None:
    with keeper([[HELLO, WHAT, None], [HELLO, WHAT, EMPTY]]) as (path, asked):
        made = await Keeper.connect(path)
        with trio.move_on_after(0.05):
            await made.ask(Forget(bytes(16), 1))
        assert await made.list() == []
        made.close()
    assert asked == ["Hello", "Describe", "Forget", "Hello", "Describe", "List"]


@pytest.mark.parametrize(
    "answer", [lambda: b"\xc1", lambda: encode_keeper(Forget(bytes(16), 1)), lambda: encode_keeper(KeeperRefusal("no"))]
)
async def test_an_answer_that_is_none_is_an_error_and_the_next_is_served(answer: Callable[[], bytes]) -> None:
    with keeper([[HELLO, WHAT, answer(), encode_keeper(Forgotten(0))]]) as (path, _):
        made = await Keeper.connect(path)
        with pytest.raises(KeeperError):
            await made.ask(Forget(bytes(16), 1))
        assert await made.ask(Forget(bytes(16), 1)) == (Forgotten(0), [])
        made.close()


async def test_a_keeper_that_is_just_ending_is_not_taken_for_one_that_cannot_answer() -> None:
    """A start right after a stop: the last keeper still listens, and is gone a moment later."""
    with keeper([[], [HELLO, WHAT, EMPTY]]) as (path, asked):
        made = await Keeper.connect(path)
        assert await made.list() == []
        made.close()
    assert asked == ["Hello", "Describe", "List"]


async def test_a_keeper_tells_what_it_is_and_one_of_an_older_release_does_not() -> None:
    with keeper([[HELLO, WHAT]]) as (path, _):
        made = await Keeper.connect(path)
        assert (made.release, made.descriptors_most) == ("9.9", 1000)
        made.close()
    refusal = encode_keeper(KeeperRefusal("unknown kind of message 'Describe'"))
    with keeper([[encode_keeper(HelloReply(VERSION, os.getpid())), refusal]]) as (path, _):
        made = await Keeper.connect(path)
        assert (made.release, made.descriptors_most) == (None, descriptor_limit_of(os.getpid()))
        made.close()


async def test_a_keeper_that_serves_another_is_busy() -> None:
    refusal = encode_keeper(KeeperRefusal("another manager is connected; stop it first"))
    with keeper([[refusal]]) as (path, _), pytest.raises(BusyError, match="another manager"):
        await Keeper.connect(path)


async def test_what_cannot_be_connected_to_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(KeeperError, match="cannot connect"):
        await Keeper.connect(tmp_path / "f" / "k")


async def test_a_keeper_that_was_killed_is_replaced_and_leaves_no_zombie() -> None:
    with tempfile.TemporaryDirectory(prefix="vt") as folder:
        made = await Keeper.connect(Path(folder) / "k")
        first = made.pid
        try:
            os.kill(first, signal.SIGKILL)
            # it has ended, and is this process's to reap
            await trio.to_thread.run_sync(os.waitid, os.P_PID, first, os.WEXITED | os.WNOWAIT)
            assert await made.list() == []
            assert made.pid != first
            assert str(first) not in os.listdir("/proc")
        finally:
            made.close()
            os.kill(made.pid, signal.SIGTERM)
            await trio.to_thread.run_sync(os.waitpid, made.pid, 0)

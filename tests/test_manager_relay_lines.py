"""The far side's lines to a real swtpm: what a death tells of a request, and what the next one is told first."""

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
import vtpm_instance_rig as tpm
from e2e_rig import wait_for
from vtpm_instance_commands import create_primary_rsa

from manager.relay_asking import NotTakenError, Places, UnknownError, ask, connected
from manager.relay_cutting import failure, set_locality, succeeded
from manager.relay_lines import ControlLine, DataLine, Locality, PassedLine

PATIENCE = 20.0
DATAFD = bytes.fromhex("00000010")
INIT = bytes.fromhex("0000000200000000")
CAPABILITY = bytes.fromhex("00000001")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rl") as made:
        yield Path(made)


@contextmanager
def swtpm(folder: Path, *, data: bool = True) -> Iterator["subprocess.Popen[bytes]"]:
    control = folder / "ctrl"
    control.unlink(missing_ok=True)
    words = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={folder}", "--ctrl", f"type=unixio,path={control}"]
    words += ["--flags", "not-need-init,startup-clear"]
    words += ["--server", f"type=unixio,path={folder}/data"] if data else []
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(control.exists, "swtpm")
        yield process
    finally:
        process.kill()
        process.wait()


def finder(folder: Path) -> tuple[list[int], "object"]:
    found: list[int] = []

    async def find() -> Places:
        await trio.lowlevel.checkpoint()
        found.append(1)
        return Places(folder / "ctrl", folder / "data")

    return found, find


@asynccontextmanager
async def peer() -> AsyncIterator[tuple[trio.socket.SocketType, socket.socket]]:
    ours, theirs = socket.socketpair()
    with trio.socket.from_stdlib_socket(ours) as sock, theirs:
        yield sock, theirs


async def test_a_peer_that_goes_without_reading_has_not_taken_the_request() -> None:
    async with peer() as (sock, theirs), trio.open_nursery() as nursery:

        async def go() -> None:
            await trio.sleep(0.02)
            theirs.close()

        nursery.start_soon(go)
        with pytest.raises(NotTakenError):
            await ask(sock, tpm.get_random(8), control=False)
    async with peer() as (sock, theirs):
        theirs.close()
        with pytest.raises(NotTakenError):
            await ask(sock, tpm.get_random(8), control=False)


async def test_a_peer_that_has_read_it_may_have_executed_it() -> None:
    async with peer() as (sock, theirs), trio.open_nursery() as nursery:

        async def read_and_go() -> None:
            await trio.sleep(0.02)
            theirs.recv(4096)
            theirs.close()

        nursery.start_soon(read_and_go)
        with pytest.raises(UnknownError):
            await ask(sock, tpm.get_random(8), control=False)


async def test_half_an_answer_is_none() -> None:
    async with peer() as (sock, theirs), trio.open_nursery() as nursery:

        async def half() -> None:
            await trio.sleep(0.02)
            theirs.send(bytes.fromhex("80010000001400000000"))
            theirs.close()  # with the request unread: a reset, which says nothing once there was half an answer

        nursery.start_soon(half)
        with pytest.raises(UnknownError):
            await ask(sock, tpm.get_random(8), control=False)


async def test_an_answer_without_end_ends_the_connection() -> None:
    async with peer() as (sock, theirs):
        theirs.send(b"\x80\x01\xff\xff\xff\xff" + bytes(100))
        with pytest.raises(UnknownError):
            await ask(sock, tpm.get_random(8), control=False)


async def test_a_killed_tpm_comes_back_with_its_locality_and_data_connection(folder: Path) -> None:
    _, find = finder(folder)
    control = ControlLine(find, Locality(), PATIENCE)  # type: ignore[arg-type]
    passed = PassedLine(control, PATIENCE, wanted=False)
    control.passed = passed
    with trio.fail_after(60):
        with swtpm(folder, data=False) as process:
            assert await control.exchange(DATAFD) == bytes(4)
            assert await control.exchange(set_locality(2)) == bytes(4)
            assert tpm.rc(await passed.exchange(tpm.pcr_extend(20))) == 0
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        answers: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def extend() -> None:
                answers.append(await passed.exchange(tpm.pcr_extend(20)))

            nursery.start_soon(extend)
            await trio.sleep(0.2)
            assert not answers, "it does not wait"
            with swtpm(folder, data=False):
                while not answers:  # noqa: ASYNC110 - a line answers when it can
                    await trio.sleep(0.01)
                assert tpm.rc(answers[0]) == 0, "not at locality 2"
                read = tpm.rc(await passed.exchange(tpm.pcr_read(20)))
        assert read == 0
    control.close()


async def test_what_was_read_and_not_answered_is_failure_and_not_said_again(folder: Path) -> None:
    """Also where the next TPM is there at once, and would be glad to execute it."""
    _, find = finder(folder)
    line = DataLine(find, Locality(), PATIENCE)  # type: ignore[arg-type]
    command, answers = create_primary_rsa(3072), []
    with trio.fail_after(60):
        for _ in range(5):  # a key can be found at once, and the answer be there before the kill
            async with trio.open_nursery() as nursery:
                with swtpm(folder) as process:
                    await line.exchange(tpm.get_random(8))
                    nursery.start_soon(kill_soon, process)
                    nursery.start_soon(tell, line, command, answers)
                    await trio.to_thread.run_sync(process.wait)
                with swtpm(folder):
                    while not answers:  # noqa: ASYNC110 - a line answers when it can
                        await trio.sleep(0.01)
            if tpm.rc(answers[-1]):
                break
            answers.clear()
    assert answers == [failure(command, control=False)]
    line.close()


async def tell(line: ControlLine | DataLine | PassedLine, command: bytes, answers: list[bytes]) -> None:
    answers.append(await line.exchange(command))


async def kill_soon(process: "subprocess.Popen[bytes]") -> None:
    await trio.sleep(0.03)
    os.kill(process.pid, signal.SIGKILL)


async def test_a_data_connection_on_its_way_out_does_not_cost_the_control_connection(folder: Path) -> None:
    """A holder closes its copy when it gets to it; the end of the control connection would switch the TPM off."""
    _, find = finder(folder)
    control = ControlLine(find, Locality(), PATIENCE)  # type: ignore[arg-type]
    passed = control.passed = PassedLine(control, PATIENCE, wanted=False)
    with trio.fail_after(60), swtpm(folder, data=False):
        assert await control.exchange(DATAFD) == bytes(4)
        assert passed.sock is not None
        before, copy = control.sock, os.dup(passed.sock.fileno())
        passed.drop()
        answers: list[bytes] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell, passed, tpm.get_random(8), answers)
            await trio.sleep(0.3)
            assert not answers
            assert control.sock is before
            os.close(copy)
        assert tpm.rc(answers[0]) == 0
        assert control.sock is before
    control.close()


async def test_patience_ends_with_failure(folder: Path) -> None:
    _, find = finder(folder)
    control = ControlLine(find, Locality(), 0.2)  # type: ignore[arg-type]
    answer = await control.exchange(CAPABILITY)
    assert len(answer) == 8
    assert not succeeded(answer)
    control.close()
    line = DataLine(find, Locality(), 0.2)  # type: ignore[arg-type]
    assert tpm.rc(await line.exchange(tpm.get_random(8))) == 0x101


async def test_who_has_gone_is_waited_for_by_nobody(folder: Path) -> None:
    """Also with a question that may be said twice: else a client that comes and goes leaves something each time."""
    looked, find = finder(folder)
    control, answers = ControlLine(find, Locality(), PATIENCE), []  # type: ignore[arg-type,var-annotated]
    with trio.fail_after(PATIENCE / 2):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tell, control, CAPABILITY, answers)
            while not looked:  # noqa: ASYNC110 - it does not say when it begins
                await trio.sleep(0.01)
            control.close()
    assert not succeeded(answers[0])


async def test_a_data_line_sets_the_locality_again_for_the_next_instance(folder: Path) -> None:
    _, find = finder(folder)
    locality = Locality()
    control = ControlLine(find, locality, PATIENCE)  # type: ignore[arg-type]
    line = DataLine(find, locality, PATIENCE)  # type: ignore[arg-type]
    with trio.fail_after(60):
        with swtpm(folder):
            assert await control.exchange(set_locality(2)) == bytes(4)
            assert tpm.rc(await line.exchange(tpm.pcr_extend(20))) == 0
            control.close()
        with swtpm(folder):
            assert tpm.rc(await line.exchange(tpm.pcr_extend(20))) == 0
    line.close()


async def test_nobody_there_is_said_at_once(folder: Path) -> None:
    with pytest.raises(NotTakenError):
        await connected(folder / "nothing")

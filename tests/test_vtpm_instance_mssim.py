"""The simulator's two ports: tpm2-tools over the mssim TCTI on a real instance, and every request however it is cut."""

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest
from control_recorder import Recorder, cut
from hypothesis import given
from hypothesis import strategies as st
from tcp_bench import TcpBench
from test_vtpm_instance_stand_in import CANCELED, has_answer
from vtpm_instance_commands import create_primary_rsa, flush, get_random, pcr_extend, pcr_read, rc
from vtpm_instance_rig import KeeperProcess, extended, receive_exactly, running_keeper

from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance.front_ends import RULES, FrontEnd
from vtpm_instance.mssim import COMMAND_PORT, PLATFORM_PORT, MssimSession, Signal

DONE = bytes(4)


@pytest.fixture(scope="module")
def keeper() -> Iterator[KeeperProcess]:
    with running_keeper() as process:
        yield process


@pytest.fixture
def bench(keeper: KeeperProcess) -> Iterator[TcpBench]:
    made = TcpBench(keeper, frontend="mssim")
    made.spawn()
    yield made
    made.close()


def send_command(sock: socket.socket, packet: bytes, locality: int = 0) -> bytes:
    sock.sendall(struct.pack(">IBI", 8, locality, len(packet)) + packet)
    return receive_command(sock)


def receive_command(sock: socket.socket) -> bytes:
    answer = receive_exactly(sock, int.from_bytes(receive_exactly(sock, 4)))
    assert receive_exactly(sock, 4) == DONE
    return answer


def test_tpm2_tools_work_over_the_mssim_tcti(bench: TcpBench) -> None:
    environment = {**os.environ, "TPM2TOOLS_TCTI": f"mssim:host=127.0.0.1,port={bench.port}"}

    def run(*arguments: str) -> str:
        return subprocess.run(arguments, env=environment, capture_output=True, check=True, text=True).stdout

    run("tpm2_startup", "-c")  # it was started already, and the tool knows that answer
    run("tpm2_pcrextend", f"7:sha256={'11' * 32}")
    assert extended(b"\x11" * 32).hex() in run("tpm2_pcrread", "sha256:7").lower()
    run("tpm2_nvdefine", "0x1500001", "-s", "4", "-a", "ownerread|ownerwrite")
    subprocess.run(["tpm2_nvwrite", "0x1500001", "-C", "o", "-i-"], env=environment, input=b"kept", check=True)
    assert run("tpm2_nvread", "0x1500001", "-C", "o", "-s", "4") == "kept"
    run("tpm2_shutdown", "-c")


def test_power_localities_and_hash_signals(bench: TcpBench) -> None:
    with bench.connect() as command, bench.connect(1) as platform:
        command.sendall(struct.pack(">II", 15, 1))
        assert receive_exactly(command, 12) == struct.pack(">III", 1, 1, 0)
        assert rc(send_command(command, pcr_extend(20), 3)) == 0
        assert rc(send_command(command, pcr_extend(20), 0)) == 0x907
        assert rc(send_command(command, pcr_extend(20), 5)) == 0x907
        assert rc(send_command(command, pcr_extend(7))) == 0
        for signal in (1, 11, 3, 4, 12, 13, 14, 10):
            platform.sendall(struct.pack(">I", signal))
            assert receive_exactly(platform, 4) == DONE
        assert send_command(command, pcr_read(7))[-32:] == extended(b"\x11" * 32), "it was on: nothing was reset"
        platform.sendall(struct.pack(">II", 2, 1))
        assert receive_exactly(platform, 8) == DONE * 2
        assert send_command(command, pcr_read(7))[-32:] == bytes(32), "power off and on"
        assert rc(send_command(command, pcr_extend(7))) == 0
        platform.sendall(struct.pack(">I", 17))
        assert receive_exactly(platform, 4) == DONE
        assert send_command(command, pcr_read(7))[-32:] == bytes(32), "reset"
        command.sendall(struct.pack(">IIIII", 5, 6, 4, 0xABCDEF01, 7))
        assert receive_exactly(command, 12) == DONE * 3
        platform.sendall(struct.pack(">I", 2))
        assert receive_exactly(platform, 4) == DONE
        assert rc(send_command(command, get_random())) == 0x101
        platform.sendall(struct.pack(">I", 20))
        command.sendall(struct.pack(">I", 20))
        assert (platform.recv(1), command.recv(1)) == (b"", b"")


def test_a_cancel_on_the_platform_port_ends_the_making_of_a_key(bench: TcpBench) -> None:
    packet = create_primary_rsa()
    early = 0
    with bench.connect() as command, bench.connect(1) as platform:
        for _ in range(30):
            command.sendall(struct.pack(">IBI", 8, 0, len(packet)) + packet)
            platform.sendall(struct.pack(">I", 9))
            assert receive_exactly(platform, 4) == DONE
            early += not has_answer(command)
            answer = receive_command(command)
            if rc(answer) == CANCELED:
                break
            assert rc(send_command(command, flush(answer[10:14]))) == 0
        else:
            raise AssertionError("no command was cancelled")
    assert early


def test_who_speaks_something_else_is_let_go(bench: TcpBench) -> None:
    for offset, request in ((0, b"GET / HTTP/1.1\r\n"), (1, b"\0\0\0\x08"), (0, struct.pack(">IBI", 8, 0, 4097))):
        with bench.connect(offset) as sock:
            sock.sendall(request)
            with suppress(ConnectionResetError):
                assert sock.recv(1) == b""
    with bench.connect() as command:
        assert rc(send_command(command, get_random())) == 0


class _Server:
    """What a session needs of a server: its vTPM echoes."""

    rules = RULES[FrontEnd.MSSIM]

    def __init__(self) -> None:
        self.vtpm = self
        self.family = TpmFamily.TPM_2_0
        self.locality = 0

    def set_locality(self, locality: int) -> int:
        self.locality = locality
        return 0x3D if locality > 4 else 0

    @staticmethod
    def execute(command: bytes, _locality: int) -> bytes:
        return command


def served(stream: Iterator[bytes], table: dict[Signal, object]) -> tuple[list[bytes], list[object]]:
    machine = Recorder()
    session = MssimSession(table, _Server(), machine)  # type: ignore[arg-type]
    answers = []
    for piece in stream:
        session.buffer[: len(piece)] = piece
        answer = session.exchange(len(piece))
        while answer is not None and not session.closing:
            answers.append(answer)
            answer = session.next_answer()
    return answers, machine.done


requests = st.one_of(
    st.sampled_from([5, 7]).map(lambda signal: struct.pack(">I", signal)),
    st.binary(max_size=50).map(lambda body: struct.pack(">II", 6, len(body)) + body),
    st.tuples(st.integers(0, 255), st.binary(max_size=60)).map(
        lambda pair: struct.pack(">IBI", 8, pair[0], len(pair[1])) + pair[1]
    ),
    st.integers(0, 9).map(lambda version: struct.pack(">II", 15, version)),
)


@given(st.lists(requests, max_size=8), st.lists(st.integers(1, 30), min_size=1))
def test_any_requests_are_answered_the_same_however_they_are_cut(stream: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(stream)
    expected = served(iter([whole]), COMMAND_PORT)  # type: ignore[arg-type]
    assert len(expected[0]) == len(stream)
    assert served(cut(whole, cuts), COMMAND_PORT) == expected  # type: ignore[arg-type]


@given(st.lists(st.binary(max_size=30)), st.booleans())
def test_any_bytes_do_no_harm(pieces: list[bytes], platform: bool) -> None:
    served(iter(pieces), PLATFORM_PORT if platform else COMMAND_PORT)  # type: ignore[arg-type]

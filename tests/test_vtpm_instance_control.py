"""The control channel's table and session, sans-IO: every command in each state and role, however it is cut."""

import os
import socket
import struct
from itertools import product

import pytest
from control_recorder import BLOB, INFO, REQUESTS, answers, cut, number, session_of
from hypothesis import given
from hypothesis import strategies as st

from frontend_backend.tpmhdr import TpmFamily
from vtpm_instance.connection import Connection
from vtpm_instance.control import TABLE, Command, ControlSession, FrontEnd, Result, Role, capabilities
from vtpm_instance.control_table import MAX_BLOB
from vtpm_instance.sessions import ControlPortSession

OK, BAD_PARAMETER, FAIL, BAD_ORDINAL = (struct.pack(">I", code) for code in (0, 3, 9, 0xA))

# Who may ask, said by hand: "all"; "guest", all but others on QEMU's own channel; "owner" of any front end;
# "machine", the owner where the guest's machine is at the other end; "swtpm", the command in swtpm's place alone.
WHO = {
    "all": "GET_CAPABILITY GET_CONFIG GET_INFO",
    "guest": "GET_TPMESTABLISHED SET_LOCALITY CANCEL_TPM_CMD SET_BUFFERSIZE",
    "owner": "INIT",
    "machine": "SHUTDOWN HASH_START HASH_DATA HASH_END RESET_TPMESTABLISHED GET_STATEBLOB SET_STATEBLOB STOP "
    "SET_DATAFD LOCK_STORAGE",
    "swtpm": "STORE_VOLATILE",
}
RUNNING = {"HASH_START", "HASH_DATA", "HASH_END", "CANCEL_TPM_CMD", "STORE_VOLATILE"}
RUNNING |= {"RESET_TPMESTABLISHED", "GET_STATEBLOB"}
AT_ONCE = {"GET_CAPABILITY", "SET_LOCALITY", "CANCEL_TPM_CMD", "GET_CONFIG"}  # while a TPM command runs

ANSWERS = {
    Command.GET_CAPABILITY: (struct.pack(">II", 0, 0x1FFFF), None),
    Command.INIT: (OK, ("power_on", 0)),
    Command.SHUTDOWN: (OK, "shutdown"),
    Command.GET_TPMESTABLISHED: (OK + b"\1\0\0\0", "established"),
    Command.SET_LOCALITY: (OK, ("set_locality", 0)),
    Command.HASH_START: (OK, "hash_start"),
    Command.HASH_DATA: (OK, ("hash_data", b"abc")),
    Command.HASH_END: (OK, "hash_end"),
    Command.CANCEL_TPM_CMD: (OK, "cancel"),
    Command.STORE_VOLATILE: (OK, "store_volatile"),
    Command.RESET_TPMESTABLISHED: (OK, ("reset_established", 3)),
    Command.GET_STATEBLOB: (struct.pack(">IIII", 0, 2, len(BLOB), len(BLOB)) + BLOB, ("get_blob", 1, 1)),
    Command.SET_STATEBLOB: (OK, ("set_blob", 2, 0, b"blob")),
    Command.STOP: (OK, "power_off"),
    Command.GET_CONFIG: (struct.pack(">II", 0, 3), "config"),
    Command.SET_DATAFD: (BAD_PARAMETER, None),  # no descriptor came along
    Command.SET_BUFFERSIZE: (struct.pack(">IIII", 0, 4096, 2808, 4096), ("buffer_size", 0)),
    Command.GET_INFO: (struct.pack(">III", 0, len(INFO), 3072) + INFO[:3072], ("info", 1)),
    Command.LOCK_STORAGE: (OK, ("lock_storage", 300)),
}


def may_ask(command: Command, front: FrontEnd, role: Role) -> bool:
    (who,) = (who for who, names in WHO.items() if command.name in names.split())
    if who == "all" or front is FrontEnd.SWTPM:
        return True
    if who == "guest":
        return (front, role) != (FrontEnd.QEMU, Role.OTHER)
    if who == "owner":
        return role is Role.OWNER
    return who == "machine" and (front, role) == (FrontEnd.QEMU, Role.OWNER)


def refusal(command: Command) -> bytes:
    return BAD_ORDINAL + bytes(12) if command is Command.GET_STATEBLOB else BAD_ORDINAL


def test_every_command_is_in_the_table_and_served() -> None:
    assert set(TABLE) == set(Command) == set(REQUESTS) == set(ANSWERS)
    assert len(TABLE) == 19
    for entry in TABLE.values():
        assert (entry.handler is None) == (entry.layout.counted_at is not None) != (entry.begin is None)
        assert entry.allowed


@pytest.mark.parametrize(("front", "role"), list(product(FrontEnd, Role)))
def test_every_command_is_answered_by_whom_and_in_which_state_it_is_asked(front: FrontEnd, role: Role) -> None:
    for command, running in product(Command, (True, False)):
        session, machine = session_of(front, role, running=running)
        expected, done = ANSWERS[command]
        if command is Command.GET_CAPABILITY:
            expected = struct.pack(">II", 0, capabilities(front))
        if command is Command.SET_STATEBLOB and running:
            expected, done = BAD_ORDINAL, None
        if not may_ask(command, front, role) or (not running and command.name in RUNNING):
            expected, done = refusal(command), None
        assert answers(session, REQUESTS[command] + number(0x0F)) == [expected, struct.pack(">II", 0, 3)], command
        assert machine.done == [*([] if done is None else [done]), "config"], command


@pytest.mark.parametrize("command", Command)
def test_a_failure_has_the_form_that_qemu_reads(command: Command) -> None:
    session, machine = session_of(running=command is not Command.SET_STATEBLOB)
    machine.result, machine.can_cancel = 0x1234, False
    (answer,) = answers(session, REQUESTS[command])
    unfailing = {Command.GET_CAPABILITY: OK, Command.GET_CONFIG: OK, Command.CANCEL_TPM_CMD: FAIL}
    expected = unfailing.get(command, BAD_PARAMETER if command is Command.SET_DATAFD else struct.pack(">I", 0x1234))
    assert answer[:4] == expected
    lengths = {Command.GET_STATEBLOB: 16, Command.GET_CAPABILITY: 8, Command.GET_CONFIG: 8}
    assert len(answer) == lengths.get(command, 4)


@pytest.mark.parametrize(
    ("front", "family", "bits"),
    [
        (FrontEnd.SWTPM, TpmFamily.TPM_2_0, 0x1FFFF),  # as the newest swtpm
        (FrontEnd.SWTPM, TpmFamily.TPM_1_2, 0x17FFF),
        (FrontEnd.QEMU, TpmFamily.TPM_2_0, 0x1FFBF),  # without STORE_VOLATILE
        (FrontEnd.QEMU, TpmFamily.TPM_1_2, 0x17FBF),
        (FrontEnd.SOCKET, TpmFamily.TPM_2_0, 0x0E82D),
    ],
)
def test_capabilities_are_what_is_offered(front: FrontEnd, family: TpmFamily, bits: int) -> None:
    session, _ = session_of(front, family=family)
    assert answers(session, number(Command.GET_CAPABILITY)) == [struct.pack(">II", 0, bits)]
    needed = {TpmFamily.TPM_2_0: 0x348F, TpmFamily.TPM_1_2: 0x340F}[family]  # by QEMU, or the device is not made
    assert front is FrontEnd.SOCKET or bits & needed == needed


@pytest.mark.parametrize("padding", [b"", bytes(3)])
@pytest.mark.parametrize("command", [Command.SET_LOCALITY, Command.RESET_TPMESTABLISHED])
def test_a_locality_has_one_byte_or_qemus_four_however_they_are_cut(command: Command, padding: bytes) -> None:
    stream = number(command, b"\0" + padding) + number(command, b"\3" + padding) + number(Command.GET_CONFIG)
    for at in range(len(stream) + 1):
        session, machine = session_of()
        assert answers(session, stream[:at], stream[at:]) == [OK, OK, struct.pack(">II", 0, 3)]
        name = "set_locality" if command is Command.SET_LOCALITY else "reset_established"
        assert machine.done == [(name, 0), (name, 3), "config"]


def test_padding_that_is_not_zero_is_dropped_when_it_comes_with_its_command() -> None:
    session, _ = session_of()
    assert answers(session, number(Command.SET_LOCALITY, b"\0\xde\xad\xbe"), number(Command.STOP)) == [OK, OK]


def test_an_unknown_command_is_refused_with_what_came_along() -> None:
    session, _ = session_of()
    assert answers(session, struct.pack(">I", 0x63) + b"payload", number(Command.STOP)) == [BAD_ORDINAL, OK]


def test_while_a_tpm_command_runs_what_needs_the_tpm_waits_and_what_follows_it_on_the_same_connection() -> None:
    for command in set(Command) - {Command.SET_STATEBLOB}:
        session, machine = session_of()
        machine.busy = True
        got = answers(session, REQUESTS[command] + number(Command.GET_CONFIG))
        if command.name in AT_ONCE:
            assert (len(got), session.held) == (2, False), command
            continue
        assert (got, machine.done, session.held, session.pending) == ([], [], True, True), command
        machine.busy = False
        assert len(answers(session, b"")) == 2
        assert (session.held, session.pending) == (False, False)


# bodies


def test_hash_data_is_passed_on_as_it_comes_and_waits_in_the_middle_while_a_tpm_command_runs() -> None:
    session, machine = session_of()
    assert answers(session, number(7, struct.pack(">I", 6) + b"ab")) == []
    assert (machine.done, session.pending, session.held) == ([("hash_data", b"ab")], True, False)
    machine.busy = True
    assert answers(session, b"cd") == []
    assert (machine.done, session.held) == ([("hash_data", b"ab")], True)
    machine.busy = False
    assert answers(session, b"ef") == [OK]
    assert machine.done == [("hash_data", b"abcdef")]


def test_hash_data_that_fails_is_read_to_its_end_and_says_so_once() -> None:
    session, machine = session_of()
    machine.result = 0x26
    head = number(7, struct.pack(">I", 600))
    got = answers(session, head + bytes(200), bytes(200), bytes(200) + number(Command.GET_CONFIG))
    assert got == [struct.pack(">I", 0x26), struct.pack(">II", 0, 3)]
    assert machine.done == [("hash_data", bytes(200)), "config"]


@pytest.mark.parametrize("command", [Command.HASH_DATA, Command.SET_STATEBLOB])
def test_the_body_of_a_refused_command_is_read_and_not_kept(command: Command) -> None:
    session, machine = session_of(FrontEnd.QEMU, Role.OTHER)
    length = 3_000_000
    payload = struct.pack(">I", length) if command is Command.HASH_DATA else struct.pack(">III", 0, 1, length)
    assert answers(session, number(command, payload)) == []
    got = []
    for _ in range(length // 1000):
        session.feed(bytes(1000))
        got.append(session.next_answer())
        assert len(session._buffer) == 0
    assert got == [None] * (len(got) - 1) + [BAD_ORDINAL]
    assert answers(session, number(Command.GET_CAPABILITY)) == [struct.pack(">II", 0, capabilities(FrontEnd.QEMU))]
    assert machine.done == []


@pytest.mark.parametrize(("length", "result"), [(MAX_BLOB, 0), (MAX_BLOB + 1, 9), (0, 0)])
def test_a_state_blob_may_have_half_a_mebibyte(length: int, result: int) -> None:
    session, machine = session_of(running=False)
    head = number(0xD, struct.pack(">III", 1, 1, length))
    body = b"b" * length
    got = answers(session, *cut(head + body + number(Command.STOP), [4096]))
    assert got == [struct.pack(">I", result), OK]
    assert machine.done == [*([] if result else [("set_blob", 1, 1, body)]), "power_off"]


def test_a_state_blob_while_the_tpm_runs_is_refused_and_the_stream_stays_in_step() -> None:
    session, machine = session_of()
    assert answers(session, REQUESTS[Command.SET_STATEBLOB] + number(Command.STOP)) == [BAD_ORDINAL, OK]
    assert machine.done == ["power_off"]


@pytest.mark.parametrize("offset", [0, 1, 1000, len(BLOB) - 1, len(BLOB), 5000, 0xFFFFFFFF])
def test_a_state_blob_comes_from_an_offset_in_one_piece(offset: int) -> None:
    session, _ = session_of()
    rest = BLOB[offset:]
    assert answers(session, number(0xC, struct.pack(">III", 0, 1, offset))) == [
        struct.pack(">IIII", 0, 2, len(rest), len(rest)) + rest
    ]


def test_pieces_of_a_state_blob_are_pieces_of_one_until_it_is_begun_again() -> None:
    session, machine = session_of()
    wanted = [(0, 1), (100, 1), (200, 1), (100, 2), (0, 1)]
    for offset, kind in wanted:
        answers(session, number(0xC, struct.pack(">III", 0, kind, offset)))
    assert machine.done == [("get_blob", 1, 0), ("get_blob", 2, 0), ("get_blob", 1, 0)]


def test_a_blob_that_is_not_there_is_said_in_the_head_of_one() -> None:
    session, machine = session_of()
    machine.result = Result.RETRY
    assert answers(session, number(0xC, struct.pack(">III", 1, 3, 0))) == [struct.pack(">IIII", 0x800, 0, 0, 0)]


@pytest.mark.parametrize("offset", [0, 3000, len(INFO) - 2, len(INFO) - 1, len(INFO), 0xFFFFFFFF])
def test_information_comes_in_pieces_of_3072_with_its_zero_byte_and_not_from_beyond_its_end(offset: int) -> None:
    session, _ = session_of()
    piece = INFO[offset : offset + 3072]
    good = struct.pack(">III", 0, len(INFO), len(piece)) + piece
    expected = good if offset < len(INFO) - 1 else BAD_PARAMETER
    assert answers(session, number(0x12, struct.pack(">QII", 2**40, offset, 0))) == [expected]


# descriptors


def passed(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def port_session(front: FrontEnd = FrontEnd.QEMU) -> tuple[ControlPortSession, list[object]]:
    session, machine = session_of(front)
    return ControlPortSession(front, Role.OWNER, session.machine), machine.done


def say(session: ControlPortSession, data: bytes) -> bytes | None:
    session.buffer[: len(data)] = data
    return session.exchange(len(data))


def test_one_descriptor_is_taken_whenever_it_came_with_the_bytes_of_its_command() -> None:
    for at in range(4):
        session, done = port_session()
        (descriptor,) = passed(1)
        request = REQUESTS[Command.SET_DATAFD]
        got = []
        for index in range(4):
            if index == at:
                session.take_in([descriptor])
            got.append(say(session, request[index : index + 1]))
        assert got == [None, None, None, OK]
        assert (done, session.is_platform, is_open(descriptor)) == (["take_data_descriptor"], True, False)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_none_or_several_are_refused_and_closed(count: int) -> None:
    session, done = port_session()
    descriptors = passed(count)
    session.take_in(descriptors)
    assert say(session, REQUESTS[Command.SET_DATAFD]) == BAD_PARAMETER
    assert (done, session.is_platform) == ([], False)
    assert not any(map(is_open, descriptors))


def test_what_nobody_takes_is_closed_with_the_answer_and_with_the_connection() -> None:
    session, _ = port_session(FrontEnd.SOCKET)
    descriptors = passed(3)
    session.take_in(descriptors[:1])
    assert say(session, REQUESTS[Command.SET_DATAFD]) == BAD_ORDINAL  # it is not for a plain socket
    session.take_in(descriptors[1:2])
    assert say(session, REQUESTS[Command.GET_CONFIG]) is not None
    session.take_in(descriptors[2:])
    assert say(session, b"\0") is None
    assert [is_open(each) for each in descriptors] == [False, False, True]
    session.end()
    assert not is_open(descriptors[2])


def test_a_machine_that_cannot_use_the_descriptor_has_no_platform_here() -> None:
    session, machine = session_of(FrontEnd.QEMU)
    machine.result = Result.IO_ERROR
    session.feed(REQUESTS[Command.SET_DATAFD], passed(1))
    assert (session.next_answer(), session.is_platform) == (struct.pack(">I", 0x1F), False)


class _Host:
    """Whoever polls: a closed connection has nothing to say to it."""

    def wait_for(self, _connection: Connection, _events: int) -> None:
        raise AssertionError

    come_back = drop = wait_for  # type: ignore[assignment]


def test_a_connection_that_was_closed_by_another_ones_turn_takes_none_itself() -> None:
    session, done = port_session()
    ours, theirs = socket.socketpair()
    with theirs:
        connection = Connection(ours, session, _Host())  # type: ignore[arg-type]
        session.feed(REQUESTS[Command.GET_CONFIG])
        connection.close()
        connection.step()
    assert done == []


def test_what_a_session_knows_survives_in_its_note() -> None:
    for padded, platform in product((False, True), repeat=2):
        session, _ = session_of()
        session.is_platform = platform
        answers(session, REQUESTS[Command.SET_LOCALITY if padded else Command.STOP])
        again, machine = session_of()
        again.take_up(session.note)
        assert again.is_platform == platform
        assert answers(again, bytes(3) + number(Command.STOP)) == ([OK] if padded else [BAD_ORDINAL])
        assert machine.done == (["power_off"] if padded else [])


# any bytes


@given(
    st.lists(st.binary(max_size=24)),
    st.sampled_from(Role),
    st.sampled_from(FrontEnd),
    st.booleans(),
    st.sampled_from(TpmFamily),
)
def test_any_bytes_cut_anywhere_give_well_formed_answers(
    pieces: list[bytes], role: Role, front: FrontEnd, running: bool, family: TpmFamily
) -> None:
    session, _ = session_of(front, role, running=running, family=family)
    for answer in answers(session, *pieces):
        assert int.from_bytes(answer[:4]) in set(Result)


requests = st.sampled_from(Command).flatmap(
    lambda command: st.binary(min_size=TABLE[command].layout.fixed, max_size=TABLE[command].layout.fixed).flatmap(
        lambda payload: st.binary(max_size=40).map(lambda body: whole_request(command, payload, body))
    )
)


def whole_request(command: Command, payload: bytes, body: bytes) -> bytes:
    layout = TABLE[command].layout
    if layout.counted_at is not None:
        head, tail = payload[: layout.counted_at], payload[layout.counted_at + 4 :]
        return number(command, head + struct.pack(">I", len(body)) + tail + body)
    if layout.padded and len(body) % 2:
        return number(command, payload + bytes(3))
    return number(command, payload)


@given(
    st.lists(requests, max_size=8),
    st.lists(st.integers(1, 30), min_size=1, max_size=8),
    st.sampled_from(FrontEnd),
    st.sampled_from(Role),
    st.booleans(),
)
def test_any_stream_of_requests_is_answered_the_same_however_it_is_cut(
    stream: list[bytes], cuts: list[int], front: FrontEnd, role: Role, running: bool
) -> None:
    whole, one = session_of(front, role, running=running)
    pieces, other = session_of(front, role, running=running)
    expected = answers(whole, b"".join(stream))
    assert answers(pieces, *cut(b"".join(stream), cuts)) == expected
    assert other.done == one.done
    assert len(expected) == len(stream)
    assert not pieces._body


def test_the_session_needs_no_descriptors_to_be_made() -> None:
    assert ControlSession(FrontEnd.QEMU, Role.OWNER, session_of()[0].machine).left_over() == []

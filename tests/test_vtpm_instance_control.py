"""The control channel's table and session, sans-IO."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_instance.control import TABLE, Command, ControlSession, FrontEnd, Result, Role, capabilities

OK, FAIL, BAD_ORDINAL, BAD_LOCALITY = (struct.pack(">I", int(result)) for result in Result)


class Recorder:
    """A machine that writes down what it is asked."""

    def __init__(self) -> None:
        self.done: list[object] = []
        self.comes_up = True
        self.busy = False
        self.can_cancel = True

    def set_locality(self, locality: int) -> bool:
        self.done.append(locality)
        return locality == 0

    def platform_reset(self) -> bool:
        self.done.append("reset")
        return self.comes_up

    def cancel(self) -> bool:
        self.done.append("cancel")
        return self.can_cancel


def number(command: Command, payload: bytes = b"") -> bytes:
    return struct.pack(">I", command) + payload


def answers(session: ControlSession, *pieces: bytes) -> list[bytes]:
    out = []
    for piece in pieces:
        session.feed(piece)
        while (answer := session.next_answer()) is not None:
            out.append(answer)
    return out


def owner_session() -> tuple[ControlSession, Recorder]:
    machine = Recorder()
    return ControlSession(FrontEnd.SOCKET, Role.OWNER, machine), machine


def test_every_known_command_is_in_the_table() -> None:
    assert set(TABLE) == set(Command)
    assert all(entry.handler is None or entry.allowed for entry in TABLE.values())


def test_capabilities_are_exactly_what_is_offered() -> None:
    session, _ = owner_session()
    assert answers(session, number(Command.GET_CAPABILITY)) == [struct.pack(">II", 0, 0b101001)]
    assert capabilities(FrontEnd.SOCKET) == 0b101001


@pytest.mark.parametrize("command", [command for command, entry in TABLE.items() if entry.handler is None])
def test_a_known_command_that_is_not_offered_is_refused_and_the_stream_stays_in_step(command: Command) -> None:
    layout = TABLE[command].layout
    payload = bytearray(layout.fixed)
    body = b""
    if layout.counted_at is not None:
        body = b"\0\0\0\1" * 300
        payload[layout.counted_at : layout.counted_at + 4] = struct.pack(">I", len(body))
    session, machine = owner_session()
    stream = number(command, bytes(payload) + body) + number(Command.CANCEL_TPM_CMD)
    assert answers(session, stream) == [BAD_ORDINAL, OK]
    assert machine.done == ["cancel"]


def test_init_resets_the_platform_for_an_owner_only() -> None:
    session, machine = owner_session()
    assert answers(session, number(Command.INIT, bytes(4))) == [OK]
    machine.comes_up = False
    assert answers(session, number(Command.INIT, bytes(4))) == [FAIL]
    assert machine.done == ["reset", "reset"]
    stranger = ControlSession(FrontEnd.SOCKET, Role.OTHER, machine)
    assert answers(stranger, number(Command.INIT, bytes(4))) == [BAD_ORDINAL]
    assert len(machine.done) == 2


@pytest.mark.parametrize("padding", [b"", bytes(3)])
def test_set_locality_takes_one_byte_or_qemus_four_however_they_are_cut(padding: bytes) -> None:
    stream = number(Command.SET_LOCALITY, b"\0" + padding) + number(Command.SET_LOCALITY, b"\3" + padding)
    stream += number(Command.GET_CAPABILITY)
    for cut in range(len(stream) + 1):
        session, machine = owner_session()
        got = answers(session, stream[:cut], stream[cut:])
        assert got == [OK, BAD_LOCALITY, struct.pack(">II", 0, 0b101001)]
        assert machine.done == [0, 3]


def test_padding_that_is_not_zero_is_dropped_when_it_comes_with_its_command() -> None:
    session, _ = owner_session()
    assert answers(session, number(Command.SET_LOCALITY, b"\0\xde\xad\xbe"), number(Command.CANCEL_TPM_CMD)) == [OK, OK]


def test_an_unknown_command_is_refused_with_what_came_along() -> None:
    session, _ = owner_session()
    assert answers(session, struct.pack(">I", 0x63) + b"payload", number(Command.CANCEL_TPM_CMD)) == [BAD_ORDINAL, OK]


def test_a_command_waits_for_its_last_byte() -> None:
    session, machine = owner_session()
    whole = number(Command.INIT, bytes(4))
    assert answers(session, *[whole[index : index + 1] for index in range(7)]) == []
    assert machine.done == []
    assert answers(session, whole[7:]) == [OK]


def test_a_cancel_that_libtpms_does_not_know_is_a_failure() -> None:
    session, machine = owner_session()
    machine.can_cancel = False
    assert answers(session, number(Command.CANCEL_TPM_CMD)) == [FAIL]


def test_while_a_command_runs_only_a_reset_waits_and_what_follows_it_on_the_same_connection() -> None:
    session, machine = owner_session()
    machine.busy = True
    stream = number(Command.CANCEL_TPM_CMD) + number(Command.SET_LOCALITY, b"\0") + number(Command.INIT, bytes(4))
    assert answers(session, stream + number(Command.GET_CAPABILITY)) == [OK, OK]
    assert (session.held, session.pending, machine.done) == (True, True, ["cancel", 0])
    machine.busy = False
    assert answers(session, b"") == [OK, struct.pack(">II", 0, 0b101001)]
    assert (session.held, session.pending, machine.done) == (False, False, ["cancel", 0, "reset"])


@given(st.lists(st.binary(max_size=24)), st.sampled_from(Role), st.sampled_from(FrontEnd))
def test_any_bytes_cut_anywhere_give_well_formed_answers(pieces: list[bytes], role: Role, front: FrontEnd) -> None:
    session = ControlSession(front, role, Recorder())
    for answer in answers(session, *pieces):
        assert len(answer) in (4, 8)
        assert int.from_bytes(answer[:4]) in set(Result)


@given(st.lists(st.sampled_from(Command), max_size=8), st.lists(st.integers(1, 9), min_size=1))
def test_known_commands_are_answered_once_each_however_they_are_cut(commands: list[Command], cuts: list[int]) -> None:
    stream = b"".join(number(command, bytes(TABLE[command].layout.fixed)) for command in commands)
    pieces, turn = [], 0
    while stream:
        cut = cuts[turn % len(cuts)]
        pieces.append(stream[:cut])
        stream = stream[cut:]
        turn += 1
    session, _ = owner_session()
    assert len(answers(session, *pieces)) == len(commands)

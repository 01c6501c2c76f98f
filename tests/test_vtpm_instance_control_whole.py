"""The short way through a control session, for a command that comes in one piece, beside the long one."""

from control_recorder import REQUESTS, Recorder, answers, cut, session_of
from hypothesis import given
from hypothesis import strategies as st

from vtpm_instance.control import Command, FrontEnd, Role
from vtpm_instance.sessions import ControlPortSession

requests = st.sampled_from(list(Command)).map(lambda command: REQUESTS[command])


def received(session: ControlPortSession, pieces: list[bytes]) -> list[bytes]:
    """What a connection makes of it: each piece is received at once."""
    found: list[bytes] = []
    for piece in pieces:
        session.buffer[: len(piece)] = piece
        answer = session.exchange(len(piece))
        while answer is not None:
            found.append(answer)
            answer = session.next_answer() if session.pending else None
    return found


@given(
    st.lists(requests, max_size=8),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.booleans(),
    st.sampled_from(FrontEnd),
    st.sampled_from(Role),
    st.booleans(),
)
def test_it_gives_the_same_answers_wherever_a_stream_is_cut(
    stream: list[bytes], cuts: list[int], by_command: bool, front: FrontEnd, role: Role, running: bool
) -> None:
    slow, one = session_of(front, role, running=running)
    other = Recorder(running=running)
    quick = ControlPortSession(front, role, other)
    pieces = stream if by_command else list(cut(b"".join(stream), cuts))
    assert received(quick, pieces) == answers(slow, b"".join(stream))
    assert other.done == one.done


def test_a_command_in_one_piece_takes_the_short_way() -> None:
    quick = ControlPortSession(FrontEnd.QEMU, Role.OWNER, Recorder())
    assert quick.execute_whole(REQUESTS[Command.GET_CONFIG]) is not None
    assert quick.execute_whole(REQUESTS[Command.GET_CONFIG] * 2) is None
    quick.feed(b"\0")
    assert quick.execute_whole(REQUESTS[Command.GET_CONFIG]) is None

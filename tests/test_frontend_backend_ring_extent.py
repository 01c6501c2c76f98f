import os
import struct

import pytest

from frontend_backend.bare_mapping import map_without_descriptor
from frontend_backend.errors import NotARingError, PageError
from frontend_backend.local import LocalRing
from frontend_backend.ring import Answered, BackRing, FrontRing, Request
from frontend_backend.ring_extent import MAX_EXTRA_PAGES, offset_of, room_of
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage


def refuse(reason: str) -> bytes:
    return b"refused: " + reason.encode()


def two_pages() -> tuple[memoryview, FrontRing, BackRing]:
    memory = memoryview(bytearray(2 * PAGE_SIZE))
    return memory, FrontRing(memory), BackRing(memory, refuse)


class Granted:
    """Extra pages that a guest grants, and who maps them."""

    def __init__(self, pages: int) -> None:
        self.memory = bytearray(pages * PAGE_SIZE)
        self.mapped: list[tuple[int, ...]] = []
        self.unmapped = 0

    def map(self, references: tuple[int, ...]) -> "Granted":
        if 666 in references:
            raise PageError("reference 666 is not granted")
        self.mapped.append(references)
        self.page = memoryview(self.memory)
        return self

    def unmap(self) -> None:
        self.unmapped += 1


def test_offsets_are_tpmifs() -> None:
    assert (offset_of(0), offset_of(1), room_of(0), room_of(1)) == (8, 12, MAX_PACKET, 8180)


@pytest.mark.parametrize("size", [MAX_PACKET + 1, 5000, 8179, 8180])
def test_long_packets_go_both_ways_and_leave_nothing(size: int) -> None:
    memory, front, back = two_pages()
    question, answer = os.urandom(size), os.urandom(8180 + MAX_PACKET + 1 - size)
    front.submit(question, locality=2)
    assert SharedPage.unpack(bytes(memory[:8])) == SharedPage(size, RingState.SUBMIT, 2, 1)
    assert bytes(memory[12 : 12 + size]) == question
    assert back.take() == Request(question, 2, 1)
    assert back.finish(answer)
    assert front.poll() == answer
    assert bytes(memory[8:]) == bytes(2 * PAGE_SIZE - 8)
    front.submit(b"short")
    assert back.take() == Request(b"short", 0)
    with pytest.raises(ValueError, match="at most 4088"):
        back.finish(bytes(MAX_PACKET + 1))
    assert back.finish(b"too")
    assert front.poll() == b"too"


def test_a_short_question_may_ask_for_a_long_answer() -> None:
    _, front, back = two_pages()
    front.submit_long(b"short", 0, 1)
    assert back.take() == Request(b"short", 0, 1)
    assert back.answer_room == 8180
    with pytest.raises(ValueError, match="at most 8180"):
        back.finish(bytes(8181))
    assert back.finish(b"a" * 8180)
    assert front.poll() == b"a" * 8180


def test_what_is_longer_than_the_back_end_takes_is_refused() -> None:
    memory = memoryview(bytearray(2 * PAGE_SIZE))
    front, back = FrontRing(memory), BackRing(memory, refuse, most=4096)
    room = bytearray(4096)
    front.submit(b"x" * 4097)
    assert isinstance(back.take(memoryview(room)), Answered)
    assert (front.poll() or b"").endswith(b"at most 4096 are taken")
    front.submit(b"y" * 4096)
    assert back.take(memoryview(room)) == 4096
    assert room == b"y" * 4096
    assert back.finish(b"taken")
    assert front.poll() == b"taken"


def test_a_front_end_does_not_submit_what_has_no_room() -> None:
    _, front, _ = two_pages()
    for packet, extra in ((bytes(8181), 1), (b"", 1), (b"x", 2), (b"x", -1), (bytes(MAX_PACKET + 1), 0)):
        with pytest.raises(ValueError, match=r"packet|extra pages"):
            front.submit_long(packet, 0, extra)
    with pytest.raises(ValueError, match="packet"):
        front.submit(bytes(8181))


def test_a_long_command_that_is_given_back_is_wiped() -> None:
    memory, front, back = two_pages()
    front.submit(b"secret" * 1000)
    back.take()
    back.abort()
    assert bytes(memory[8:]) == bytes(2 * PAGE_SIZE - 8)


@pytest.mark.parametrize(
    "head",
    [
        SharedPage(8181, RingState.SUBMIT, 0, 1),
        SharedPage(10, RingState.SUBMIT, 0, 2),
        SharedPage(10, RingState.SUBMIT, 0, 255),
        SharedPage(MAX_PACKET + 1, RingState.SUBMIT, 0, 0),
        SharedPage(2**32 - 1, RingState.SUBMIT, 0, 1),
    ],
)
def test_lies_about_extra_pages_are_refused(head: SharedPage) -> None:
    memory, front, back = two_pages()
    memory[:8] = head.pack()
    assert isinstance(back.take(), Answered)
    assert (front.poll() or b"").startswith(b"refused")


def test_granted_pages_are_mapped_by_the_references_of_each_request_and_let_go() -> None:
    granted, page = Granted(1), memoryview(bytearray(PAGE_SIZE))
    back = BackRing(page, refuse, map_extra=granted.map, extra_pages=1)
    packet = os.urandom(6000)
    page[8:12] = struct.pack("<I", 77)
    page[12:] = packet[: PAGE_SIZE - 12]
    granted.memory[: 6000 - PAGE_SIZE + 12] = packet[PAGE_SIZE - 12 :]
    page[:8] = SharedPage(6000, RingState.SUBMIT, 1, 1).pack()
    assert back.take() == Request(packet, 1, 1)
    page[8:12] = struct.pack("<I", 666)  # too late: it was copied
    assert granted.mapped == [(77,)]
    answer = os.urandom(5000)
    assert back.finish(answer)
    assert granted.unmapped == 1
    assert SharedPage.unpack(bytes(page[:8])) == SharedPage(5000, RingState.FINISH, 0, 1)
    assert bytes(page[12:]) + bytes(granted.memory[: 5000 - PAGE_SIZE + 12]) == answer
    assert not any(granted.memory[5000 - PAGE_SIZE + 12 :]), "the rest of the question is wiped"


def test_granted_pages_are_let_go_on_every_way_out() -> None:
    granted, page = Granted(1), memoryview(bytearray(PAGE_SIZE))
    back = BackRing(page, refuse, map_extra=granted.map, extra_pages=1)
    submit = SharedPage(5000, RingState.SUBMIT, 0, 1).pack()
    page[:8] = submit
    back.take()
    back.abort()
    page[:8] = submit
    back.take()
    page[SharedPage.STATE_OFFSET] = RingState.IDLE
    assert not back.finish(b"nobody waits")
    page[:8] = submit
    back.take()
    back.release()
    assert len(granted.mapped) == granted.unmapped == 3


def test_a_reference_that_cannot_be_mapped_is_refused_and_nothing_else_harmed() -> None:
    granted, page = Granted(1), memoryview(bytearray(PAGE_SIZE))
    front, back = FrontRing(page), BackRing(page, refuse, map_extra=granted.map, extra_pages=1)
    page[8:12] = struct.pack("<I", 666)
    page[:8] = SharedPage(5000, RingState.SUBMIT, 0, 1).pack()
    assert isinstance(back.take(), Answered)
    assert front.poll() == b"refused: reference 666 is not granted"
    front.submit(b"next")
    assert back.take() == Request(b"next", 0)


def test_local_rings_may_have_extra_pages_and_only_who_expects_them_takes_them() -> None:
    for mapper in (map_without_descriptor, None):
        front, back = LocalRing.pair(pages=2) if mapper is None else LocalRing.pair(mapper, pages=2)
        with front, back:
            with pytest.raises(NotARingError, match="8192 bytes"):
                LocalRing.adopt(*(os.dup(descriptor) for descriptor in back.descriptors()))
            other = LocalRing.adopt(*(os.dup(descriptor) for descriptor in back.descriptors()), most_pages=2)
            asking, answering = FrontRing(front.page), BackRing(other.page, refuse)
            asking.submit(b"z" * 7000)
            assert answering.take() == Request(b"z" * 7000, 0, 1)
            asking.release()
            answering.release()
            other.close()
    assert MAX_EXTRA_PAGES >= 1

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend_backend.errors import PageError
from frontend_backend.tpmif import MAX_PACKET, PAGE_SIZE, RingState, SharedPage

FEW = settings(max_examples=100, deadline=None)


def test_the_head_is_eight_bytes_and_a_packet_at_most_4088() -> None:
    assert (SharedPage.SIZE, SharedPage.STATE_OFFSET, PAGE_SIZE, MAX_PACKET) == (8, 4, 4096, 4088)


@pytest.mark.parametrize(("state", "byte"), [("IDLE", 0), ("SUBMIT", 1), ("FINISH", 2), ("CANCEL", 3)])
def test_states_have_the_numbers_of_tpmif_h(state: str, byte: int) -> None:
    assert RingState[state] == byte
    assert len(RingState) == 4


def test_every_field_lies_where_tpmif_h_puts_it() -> None:
    head = SharedPage(length=0x01020304, state=RingState.CANCEL, locality=5, nr_extra_pages=7)
    assert head.pack() == bytes([0x04, 0x03, 0x02, 0x01, 3, 5, 0, 7])


@pytest.mark.parametrize(("extra", "offset"), [(0, 8), (1, 12), (3, 20), (255, 1028)])
def test_the_packet_starts_behind_the_grant_references(extra: int, offset: int) -> None:
    assert SharedPage(0, RingState.IDLE, 0, extra).packet_offset == offset


@FEW
@given(st.binary(min_size=8, max_size=24))
def test_any_eight_bytes_are_a_head_or_a_page_error(untrusted: bytes) -> None:
    try:
        head = SharedPage.unpack(untrusted)
    except PageError:
        assert untrusted[4] > 3
    else:
        assert head.pack() == untrusted[:6] + b"\0" + untrusted[7:8]


@pytest.mark.parametrize("size", range(8))
def test_too_few_bytes_are_no_head(size: int) -> None:
    with pytest.raises(PageError, match=f"8 bytes, not {size}"):
        SharedPage.unpack(bytes(size))


@pytest.mark.parametrize("state", [4, 5, 0x7F, 0x80, 0xFF])
def test_an_unknown_state_is_a_page_error_that_names_it(state: int) -> None:
    with pytest.raises(PageError, match=f"^{state} is not a tpmif state$"):
        SharedPage.unpack(bytes([0, 0, 0, 0, state, 0, 0, 0]))

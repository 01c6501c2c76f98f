"""What a hibernated vTPM keeps beside its permanent state: written and read back, or refused whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vtpm_instance.errors import SlumberUnreadableError
from vtpm_instance.slumber import RESUMPTION, VOLATILE, Slumber

SLUMBERS = st.builds(Slumber, st.binary(min_size=1, max_size=64), st.booleans(), st.booleans(), st.integers(0, 255))


@given(SLUMBERS)
def test_what_is_saved_is_what_is_read_and_taken_out(slumber: Slumber) -> None:
    blobs = {"permall": b"kept"} | slumber.blobs()
    assert Slumber.taken_from(blobs) == slumber
    assert blobs == {"permall": b"kept"}
    assert Slumber.taken_from(blobs) is None


@pytest.mark.parametrize("left", [VOLATILE, RESUMPTION])
def test_one_without_the_other_is_refused(left: str) -> None:
    blobs = Slumber(b"volatile", False, False, 0).blobs()
    with pytest.raises(SlumberUnreadableError):
        Slumber.taken_from({left: blobs[left]})


@pytest.mark.parametrize("content", [b"", b"\x01\x00", b"\x02\x00\x00", b"\x01\x04\x00", b"\x01\x00\x00\x00"])
def test_what_another_release_writes_is_refused(content: bytes) -> None:
    with pytest.raises(SlumberUnreadableError):
        Slumber.taken_from({VOLATILE: b"volatile", RESUMPTION: content})


def test_it_does_not_print_what_it_holds() -> None:
    assert "secret" not in repr(Slumber(b"secret", True, True, 3))

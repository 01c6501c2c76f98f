import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend_backend.errors import HeaderError
from frontend_backend.tpmhdr import (
    HEADER_SIZE,
    CommandHeader,
    ResponseCode,
    Tag,
    TpmFamily,
    command,
    error_response,
    response_code,
)

FEW = settings(max_examples=100, deadline=None)


def test_the_header_is_big_endian_tag_size_code() -> None:
    assert CommandHeader(0x8001, 0x01020304, 0x0000017B).pack().hex(" ", 2) == "8001 0102 0304 0000 017b"
    assert HEADER_SIZE == 10


@FEW
@given(st.binary(max_size=40))
def test_any_bytes_are_a_header_or_a_header_error(untrusted: bytes) -> None:
    try:
        header = CommandHeader.unpack(untrusted)
    except HeaderError:
        assert len(untrusted) < 10 or int.from_bytes(untrusted[2:6], "big") < 10
    else:
        assert header.pack() == untrusted[:10]
        assert response_code(untrusted) == header.code


@pytest.mark.parametrize("size", range(10))
def test_a_size_below_the_header_is_refused(size: int) -> None:
    with pytest.raises(HeaderError, match=f"its header says {size}"):
        CommandHeader.unpack(CommandHeader(0x8001, size, 0).pack())


def test_an_error_response_is_a_header_with_the_tag_of_its_family() -> None:
    assert error_response(TpmFamily.TPM_2_0, ResponseCode.FAILURE).hex() == "80010000000a00000101"
    assert error_response(TpmFamily.TPM_1_2, ResponseCode.TPM12_FAIL).hex() == "00c40000000a00000009"


def test_a_command_counts_its_header_and_body() -> None:
    assert command(0x144, b"\0\0").hex() == "80010000000c000001440000"  # TPM2_Startup(CLEAR), Part 3, 9.3
    assert command(0x99, b"\0\1", Tag.TPM12_REQUEST).hex() == "00c10000000c000000990001"  # TPM_Startup(ST_CLEAR)


def test_families_are_named_as_users_write_them() -> None:
    assert [family.value for family in TpmFamily] == ["2.0", "1.2"]

import struct
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import state_format, store_format
from storage.layout import WireRecord

RECORDS = [
    item
    for module in (state_format, store_format)
    for item in vars(module).values()
    if isinstance(item, type) and issubclass(item, WireRecord) and item is not WireRecord
]


@pytest.mark.parametrize("record", RECORDS)
@given(data=st.data())
def test_any_bytes_of_the_right_size_unpack_and_pack_to_themselves(record: type[WireRecord], data: Any) -> None:
    raw = data.draw(st.binary(min_size=record.size(), max_size=record.size()))
    assert record.unpack(raw).pack() == raw


@pytest.mark.parametrize("record", RECORDS)
def test_the_table_covers_every_byte_once(record: type[WireRecord]) -> None:
    position = 0
    for row in record.table():
        assert row.offset == position
        assert row.meaning
        position += row.size
    assert position == record.size()


def test_uuids_are_uuids_and_integers_are_big_endian() -> None:
    head = store_format.SealContext(UUID(int=1), 2, 3)
    assert head.pack() == bytes(15) + b"\1" + b"\0\0\0\2" + bytes(7) + b"\3"
    assert store_format.SealContext.unpack(b"x" + head.pack(), 1) == head


def test_a_value_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(struct.error):
        store_format.SealContext(UUID(int=1), 2**32, 3).pack()

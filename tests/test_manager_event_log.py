"""Event logs in the TCG's formats, and what hostile bytes are: no log, never a crash."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frontend_backend.errors import MessageError
from frontend_backend.measurements import ALGORITHMS, PCR_OF, Measurement, all_from_text, all_to_text, unpack
from manager.event_log import EV_IPL, Event, event_log, read_log, replay

BOOT = [Measurement.of(what, [what.encode(), b"'s content"]) for what in PCR_OF]


def test_a_measurement_is_the_digests_of_its_content_as_text_and_as_bytes() -> None:
    kernel = BOOT[0]
    assert kernel.digests == {name: hashlib.new(name, b"kernel's content").digest() for name in ALGORITHMS}
    assert Measurement.from_text(kernel.to_text()) == kernel
    assert all_from_text(all_to_text(reversed(BOOT))) == tuple(BOOT)
    assert unpack(kernel.pack()) == (4, {number: kernel.digests[name] for name, number in ALGORITHMS.items()})
    assert [one.pcr for one in BOOT] == [4, 5, 5]
    with pytest.raises(MessageError, match="twice"):
        all_to_text([kernel, kernel])


@given(st.text(max_size=80))
def test_no_text_is_taken_for_a_measurement(text: str) -> None:
    with pytest.raises(MessageError):
        Measurement.from_text(f"kernel:{text}")


@given(st.integers(0, 300), st.binary(min_size=1, max_size=3))
def test_altered_bytes_are_no_measurement_or_say_something_else(at: int, piece: bytes) -> None:
    packed = BOOT[0].pack()
    altered = packed[:at] + piece + packed[at + len(piece) :]
    try:
        found = unpack(altered)
    except MessageError:
        return
    assert (found == unpack(packed)) == (altered == packed)


@pytest.mark.parametrize("family", ["2.0", "1.2"])
def test_what_is_logged_is_read_back_and_replayed(family: str) -> None:
    events = read_log(event_log(family, BOOT))
    banks = ALGORITHMS if family == "2.0" else ("sha1",)
    assert events == [Event(b.pcr, EV_IPL, {name: b.digests[name] for name in banks}, b.what.encode()) for b in BOOT]
    for bank in banks:
        values = replay(events, bank)
        value = bytes(hashlib.new(bank).digest_size)
        assert values[4] == hashlib.new(bank, value + BOOT[0].digests[bank]).digest()
        for one in BOOT[1:]:
            value = hashlib.new(bank, value + one.digests[bank]).digest()
        assert values[5] == value


def test_a_log_without_events_is_a_log_and_one_cut_short_is_none() -> None:
    assert read_log(event_log("2.0", [])) == read_log(event_log("1.2", [])) == []
    whole = event_log("2.0", BOOT)
    cuts = [cut for cut in range(len(whole)) if not readable(whole[:cut])]
    ends = [0, *(len(event_log("2.0", BOOT[:count])) for count in range(4))]
    assert cuts == [cut for cut in range(len(whole)) if cut not in ends]
    with pytest.raises(MessageError, match="algorithm"):
        read_log(whole.replace(struct.pack("<HH", 0x0C, 48), struct.pack("<HH", 0x12, 32), 1))
    with pytest.raises(MessageError, match="replayed"):
        replay(read_log(event_log("1.2", BOOT)), "sha256")


def readable(log: bytes) -> bool:
    try:
        read_log(log)
    except MessageError:
        return False
    return True


@given(st.binary(max_size=200))
def test_hostile_bytes_are_no_log_without_a_crash(data: bytes) -> None:
    whole = event_log("2.0", BOOT)
    for untrusted in (data, whole + data, whole[: -len(data) or None] + data):
        try:
            replay(read_log(untrusted), "sha256")
        except MessageError:
            continue

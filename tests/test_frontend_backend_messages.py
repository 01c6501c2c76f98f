import datetime as dt
import enum
import tracemalloc
from dataclasses import dataclass, field
from typing import Any

import msgpack
import pytest
from message_conformance import check_protocol

from frontend_backend.errors import MessageError, MessageVersionError
from frontend_backend.messages import Protocol, later


class Colour(enum.IntEnum):
    RED = 1
    GREEN = 2


class Shape(enum.StrEnum):
    ROUND = "round"


@dataclass(frozen=True, slots=True)
class Inner:
    number: int
    maybe: bytes | None = None


@dataclass(frozen=True, slots=True)
class Everything:
    truth: bool
    number: int
    ratio: float
    text: str
    data: bytes
    colour: Colour
    shape: Shape
    inner: Inner
    many: tuple[Inner, ...] = ()
    numbers: tuple[int, ...] = ()
    arguments: dict[str, str | int | bool | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Free:
    document: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Empty:
    pass


PROTOCOL = Protocol(7, (Everything, Free, Empty))


def packed(fields: object, kind: object = "Everything", version: object = 7) -> bytes:
    return bytes(msgpack.packb([version, kind, fields]))


def nested(depth: int) -> bytes:
    """Return a Free message whose document nests `depth` lists."""
    return packed({"document": {"x": 0}}, "Free")[:-1] + b"\x91" * depth + b"\x00"


def test_the_codec_carries_every_type_a_field_may_have_and_nothing_else() -> None:
    check_protocol(PROTOCOL, PROTOCOL.encode, PROTOCOL.decode, lambda untrusted: untrusted)


def test_a_message_is_version_kind_and_fields() -> None:
    assert msgpack.unpackb(PROTOCOL.encode(Free({"a": 1}))) == [7, "Free", {"document": {"a": 1}}]
    assert PROTOCOL.encode(Empty()).hex() == "9307a5456d70747980"


@dataclass(frozen=True, slots=True)
class Younger:
    number: int
    added: int = later(0)


def test_a_field_that_was_added_later_is_sent_only_if_it_says_something() -> None:
    protocol = Protocol(1, (Younger,))
    assert msgpack.unpackb(protocol.encode(Younger(5))) == [1, "Younger", {"number": 5}]
    assert msgpack.unpackb(protocol.encode(Younger(5, 7))) == [1, "Younger", {"number": 5, "added": 7}]
    for message in (Younger(5), Younger(5, 7)):
        assert protocol.decode(protocol.encode(message)) == message


def test_missing_fields_take_their_defaults_where_there_are_any() -> None:
    right = {"truth": True, "number": 1, "ratio": 2, "text": "", "data": b"", "colour": 2, "shape": "round"}
    message = PROTOCOL.decode(packed(right | {"inner": {"number": 3}}))
    assert message == Everything(True, 1, 2.0, "", b"", Colour.GREEN, Shape.ROUND, Inner(3))
    assert type(message.ratio) is float
    with pytest.raises(MessageError, match=r"Everything.*missing 1 required positional argument: 'inner'"):
        PROTOCOL.decode(packed(right))


@pytest.mark.parametrize(
    "envelope", [[], [7], [7, "Empty"], [7, "Empty", {}, 1], {}, 7, "Empty", None, [7, b"Empty", {}]]
)
def test_another_envelope_is_no_message(envelope: object) -> None:
    with pytest.raises(MessageError, match=r"^a message is \[version, kind, fields\]$"):
        PROTOCOL.decode(bytes(msgpack.packb(envelope)))


@pytest.mark.parametrize("version", [0, 6, 8, -1, 2**64 - 1])
def test_another_version_is_said_to_be_one_even_when_all_else_is_unknown(version: int) -> None:
    with pytest.raises(MessageVersionError, match="upgrade the older side") as caught:
        PROTOCOL.decode(packed({"what": "ever"}, "Unheard", version))
    assert (caught.value.theirs, caught.value.ours) == (version, 7)


def test_a_truth_value_is_no_version() -> None:
    one = Protocol(1, (Empty,))
    with pytest.raises(MessageError):
        one.decode(packed({}, "Empty", True))


@pytest.mark.parametrize("value", [True, 1.0, 2.0, b"\x01", "1", 3, None, []])
def test_a_numbers_enum_takes_only_its_numbers(value: object) -> None:
    @dataclass(frozen=True, slots=True)
    class Paint:
        colour: Colour

    paint = Protocol(7, (Paint,))
    assert paint.decode(packed({"colour": 1}, "Paint")) == Paint(Colour.RED)
    with pytest.raises(MessageError, match=r"Paint\.colour"):
        paint.decode(packed({"colour": value}, "Paint"))


@pytest.mark.parametrize("kind", ["", "everything", "Protocol", "__class__", "E" * 5000])
def test_an_unknown_kind_is_named_and_cut_short(kind: str) -> None:
    with pytest.raises(MessageError, match="unknown kind of message") as caught:
        PROTOCOL.decode(packed({}, kind))
    assert len(str(caught.value)) < 100


def test_an_unknown_field_is_named_and_cut_short() -> None:
    for name in ("surprise", "__init__", b"data", "x" * 5000):
        with pytest.raises(MessageError, match="Empty has no field") as caught:
            PROTOCOL.decode(packed({name: 1}, "Empty"))
        assert len(str(caught.value)) < 100


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", b"\x93\x07", b"\xdd\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xa1\xff"]
)
def test_truncated_and_oversized_bytes_are_no_message(junk: bytes) -> None:
    with pytest.raises(MessageError):
        PROTOCOL.decode(junk)


def test_bytes_behind_a_message_are_refused() -> None:
    with pytest.raises(MessageError, match="extra data"):
        PROTOCOL.decode(PROTOCOL.encode(Empty()) + b"\0")


def test_text_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(MessageError):
        PROTOCOL.decode(b"\x93\x07\xa5Empt\xff\x80")


@pytest.mark.parametrize("depth", [33, 100, 1000, 5000, 60000])
def test_deep_nesting_is_refused(depth: int) -> None:
    with pytest.raises(MessageError):
        PROTOCOL.decode(nested(depth))


def test_modest_nesting_in_a_document_is_fine() -> None:
    assert PROTOCOL.decode(nested(16)).document


@pytest.mark.parametrize(
    "value",
    [msgpack.ExtType(5, b"x"), msgpack.Timestamp(1, 2), {b"key": 1}, [{b"key": 1}], float("nan")],
)
def test_a_document_holds_plain_values_only(value: object) -> None:
    with pytest.raises(MessageError, match=r"Free\.document"):
        PROTOCOL.decode(packed({"document": {"x": value}}, "Free"))


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30])
def test_a_number_that_no_peer_could_read_is_not_encoded(number: int) -> None:
    with pytest.raises(MessageError, match="Free"):
        PROTOCOL.encode(Free({"n": number}))


def test_text_that_is_no_unicode_is_not_encoded() -> None:
    with pytest.raises(MessageError, match="Free"):
        PROTOCOL.encode(Free({"path": "caf\udce9"}))


@pytest.mark.parametrize("value", [object(), dt.date(2026, 1, 1), {1, 2}, bytearray(1).__iter__()])
def test_a_value_without_an_encoding_is_our_own_fault(value: object) -> None:
    with pytest.raises(TypeError):
        PROTOCOL.encode(Free({"x": value}))


def test_a_message_of_another_protocol_is_our_own_fault() -> None:
    with pytest.raises(TypeError, match="Inner is no message of this protocol"):
        PROTOCOL.encode(Inner(1))


def test_errors_do_not_repeat_the_values_of_fields() -> None:
    secret = "0123456789abcdef" * 2
    for name in ("number", "truth", "data", "inner", "many"):
        with pytest.raises(MessageError) as caught:
            PROTOCOL.decode(packed({name: secret}))
        assert secret[:8] not in str(caught.value)


def test_a_short_message_takes_no_more_memory_than_it_needs() -> None:
    """Of an instance, the heap that is grown and cut for a save is system calls and new pages for each."""
    PROTOCOL.encode(Empty())
    tracemalloc.start()
    try:
        PROTOCOL.encode(Empty())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 16 << 10


@pytest.mark.parametrize("length", [900, 1024, 1025, 5000, 1 << 20])
def test_a_message_may_be_longer_than_the_room_it_gets_at_first(length: int) -> None:
    message = Free({"text": "x" * length})
    assert PROTOCOL.decode(PROTOCOL.encode(message)) == message

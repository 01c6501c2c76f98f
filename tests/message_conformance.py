"""What every protocol's pair of encode and decode must do, whatever its messages are."""

import typing
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_strategies import any_message, kinds, near_messages

from frontend_backend.errors import MessageError, MessageVersionError
from frontend_backend.messages import Protocol

Encode = Callable[[Any], bytes]
Decode = Callable[[bytes], Any]
WRONG: dict[type, list[object]] = {
    bool: [0, 1, None, "true", b""],
    int: [True, False, 1.0, "1", None],
    float: [True, "1", None, float("nan")],
    str: [b"text", 1, None, ["a"]],
    bytes: ["text", 1, None, [1]],
}


def check_protocol(protocol: Protocol, encode: Encode, decode: Decode, frame: Encode) -> None:
    """Run every check. `frame` puts encoded bytes, right or wrong, into the transport's frame for `decode`."""
    _check_round_trip(protocol, encode, decode)
    _check_hostile_bytes(protocol, decode, frame)
    for kind in kinds(protocol):
        _check_fields(protocol, kind, lambda untrusted: decode(frame(untrusted)))


def _check_round_trip(protocol: Protocol, encode: Encode, decode: Decode) -> None:
    @settings(max_examples=100, deadline=None)
    @given(any_message(protocol))
    def survives(message: Any) -> None:
        assert decode(encode(message)) == message

    survives()


def _check_hostile_bytes(protocol: Protocol, decode: Decode, frame: Encode) -> None:
    @settings(max_examples=100, deadline=None)
    @given(st.one_of(st.binary(max_size=80), near_messages(protocol)))
    def parses_or_raises_one_type(untrusted: bytes) -> None:
        for attempt in (untrusted, frame(untrusted)):
            try:
                message = decode(attempt)
            except MessageError:
                continue
            assert type(message) in kinds(protocol)

    parses_or_raises_one_type()


def _check_fields(protocol: Protocol, kind: type, decode: Decode) -> None:
    """Replace each field of a right message by values of the wrong type, and add one that nobody declared."""
    right = _plain_example(kind)
    decode(_pack(protocol.version, kind, right))
    for name, wanted in typing.get_type_hints(kind).items():
        for wrong in _wrong_values(wanted):
            with pytest.raises(MessageError):
                decode(_pack(protocol.version, kind, right | {name: wrong}))
    with pytest.raises(MessageError, match="has no field 'surprise'"):
        decode(_pack(protocol.version, kind, right | {"surprise": 1}))
    with pytest.raises(MessageVersionError, match=f"version {protocol.version + 1}; this side speaks") as caught:
        decode(_pack(protocol.version + 1, kind, right))
    assert (caught.value.theirs, caught.value.ours) == (protocol.version + 1, protocol.version)
    with pytest.raises(MessageError):
        decode(_pack(True, kind, right))


def _pack(version: object, kind: type, fields: object) -> bytes:
    return bytes(msgpack.packb([version, kind.__name__, fields]))


def _plain_example(kind: type) -> dict[str, object]:
    return {name: _example(wanted) for name, wanted in typing.get_type_hints(kind).items()}


def _example(wanted: Any) -> object:
    """Return one right value, as msgpack carries it."""
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is tuple:
        return [_example(arguments[0])]
    if origin is dict:
        return {_example(arguments[0]): None if arguments[1] is Any else _example(arguments[1])}
    if arguments:
        return _example(arguments[0])
    if hasattr(wanted, "__members__"):
        return next(iter(wanted)).value
    if typing.get_type_hints(wanted):
        return _plain_example(wanted)
    return wanted()


def _wrong_values(wanted: Any) -> list[object]:
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is tuple:
        return [None, 1, "text", {}, [None], *([wrong] for wrong in _wrong_values(arguments[0]))]
    if origin is dict:
        return [None, 1, [], "text", {b"key": 1}, {1: 1}]
    if arguments:  # a union: wrong is what is wrong for all of it
        return [[], {}, 1.5]
    if hasattr(wanted, "__members__"):
        return [True, False, None, "no such member", 1.0, [], {}, b"", 2**40]
    return WRONG.get(wanted, [None, 1, [], "text", {"surprise": 1}])

"""Hypothesis strategies for messages, derived from the dataclasses: a new message or field is covered by itself."""

import dataclasses
import enum
import types
import typing
from typing import Any, Final

import msgpack
from hypothesis import strategies as st

from frontend_backend.messages import Protocol

SIMPLE: Final[dict[type, st.SearchStrategy[Any]]] = {
    types.NoneType: st.none(),
    bool: st.booleans(),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False),
    str: st.text(st.characters(codec="utf-8"), max_size=40),
    bytes: st.binary(max_size=64),
}
plain = st.one_of(list(SIMPLE.values()))
documents = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def values(wanted: Any) -> st.SearchStrategy[Any]:
    """Return values of a type that a message's field may have."""
    if dataclasses.is_dataclass(wanted):
        return messages(typing.cast("type", wanted))
    if isinstance(wanted, type) and issubclass(wanted, enum.Enum):
        return st.sampled_from(list(wanted))
    if wanted in SIMPLE:
        return SIMPLE[wanted]
    return _generic_values(wanted)


def _generic_values(wanted: Any) -> st.SearchStrategy[Any]:
    origin = typing.get_origin(wanted)
    if wanted is Any:
        return documents
    if origin is tuple:
        return st.lists(values(typing.get_args(wanted)[0]), max_size=4).map(tuple)
    if origin is dict:
        keys, items = typing.get_args(wanted)
        return st.dictionaries(values(keys), values(items), max_size=4)
    assert origin is types.UnionType, f"no strategy for {wanted}"
    return st.one_of([values(alternative) for alternative in typing.get_args(wanted)])


def messages(kind: type) -> st.SearchStrategy[Any]:
    """Return messages of one kind."""
    return st.builds(kind, **{name: values(wanted) for name, wanted in typing.get_type_hints(kind).items()})


def kinds(protocol: Protocol) -> list[type]:
    """Return the kinds of messages that a protocol knows."""
    return [kind for kind, _ in protocol._fields.values()]


def any_message(protocol: Protocol) -> st.SearchStrategy[Any]:
    """Return messages of every kind of a protocol."""
    return st.one_of([messages(kind) for kind in kinds(protocol)])


def near_messages(protocol: Protocol) -> st.SearchStrategy[bytes]:
    """Return bytes that are nearly messages: an envelope with fields of any type under names that exist or not."""
    names = sorted({name for kind in kinds(protocol) for name in typing.get_type_hints(kind)})
    return st.builds(
        lambda *envelope: bytes(msgpack.packb(envelope)),
        st.one_of(st.just(protocol.version), st.integers(0, 3), plain),
        st.one_of(st.sampled_from([kind.__name__ for kind in kinds(protocol)]), plain),
        st.one_of(st.dictionaries(st.one_of(st.sampled_from(names), plain), documents, max_size=6), documents),
    )

"""The codec of all messages: frozen dataclasses to msgpack and back, strictly.

A message is `[version, kind, {field: value}]`. Decoding accepts exactly the fields the dataclass declares, with
exactly their types; a missing field takes the declared default, so that fields can be added later.
What lives here: the codec. What each pair of processes says: `messages_instance`, `messages_keeper`, `messages_admin`.
"""

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgpack

from frontend_backend.errors import MessageError, MessageVersionError

_SCALARS: Final = frozenset({str, int, bool, bytes, type(None)})  # float is none of them: it may be no number
# Bytes that a message has room for at first; more are made when it is longer. msgpack's own 256 KiB would have the heap
# of an instance grown and cut, by system calls and with new pages, for each save.
_ROOM: Final = 1024
_MAX_DEPTH: Final = 32  # lists and maps inside a document; far below what msgpack, json or a stack can bear


def later(default: Any) -> Any:
    """Declare a field that was added when peers without it were already running: it is sent only if it says something.

    A peer that does not know it refuses the message; so use it for what only newer peers can have been asked for.
    """
    return dataclasses.field(default=default, metadata={"later": True})


class Protocol:
    """One conversation: a version and the messages it knows, each named by its class."""

    def __init__(self, version: int, messages: Iterable[type]) -> None:
        """Declare the kinds; every one is a frozen dataclass of the supported field types."""
        self.version = version
        self._fields: dict[str, tuple[type, Mapping[str, Any]]] = {
            message.__name__: (message, typing.get_type_hints(message)) for message in messages
        }

    def encode(self, message: object) -> bytes:
        """Return the bytes of `message`.

        Raises:
            MessageError: a value that no peer could read: a number beyond 64 bits, text that is no Unicode.
            TypeError: not a message of this protocol, or a field of a type that messages do not have.

        """
        kind = type(message).__name__
        if kind not in self._fields:
            raise TypeError(f"{kind} is no message of this protocol")
        try:
            return bytes(msgpack.packb([self.version, kind, _plain_fields(message)], buf_size=_ROOM))
        except (ValueError, OverflowError) as error:
            raise MessageError(f"{kind} holds a value that cannot be sent: {error}") from error

    def decode(self, untrusted: bytes) -> Any:
        """Return the message in `untrusted`, an instance of one of the declared classes.

        Raises:
            MessageError: not a message, unknown kind, wrong, missing or unknown field.
            MessageVersionError: another version.

        """
        message = _unpacked(untrusted)
        # no `match`: CPython 3.11 raises and drops an error for each class in its patterns
        if type(message) is not list or [type(item) for item in message] != [int, str, dict]:
            raise MessageError("a message is [version, kind, fields]")
        version, kind, fields = message
        if version != self.version:
            raise MessageVersionError(version, self.version)
        return self._build(kind, fields)

    def _build(self, kind: str, fields: dict[Any, Any]) -> Any:
        try:
            message, hints = self._fields[kind]
        except KeyError:
            raise MessageError(f"unknown kind of message {kind[:40]!r}") from None
        return _construct(message, hints, fields)


def _unpacked(untrusted: bytes) -> Any:
    try:
        return msgpack.unpackb(untrusted, use_list=True, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        reason = str(error)
    # not inside the handler: msgpack's exception carries what it had unpacked, which may be a key
    raise MessageError(f"{len(untrusted)} bytes that are no message: {reason}")


def _construct(message: type, hints: Mapping[str, Any], fields: dict[Any, Any]) -> Any:
    """Check every field against its declared type and build the dataclass."""
    values = {}
    for name, value in fields.items():
        wanted = hints.get(name)
        if wanted is None:
            unknown = min(str(key) for key in fields if key not in hints)
            raise MessageError(f"{message.__name__} has no field {unknown[:40]!r}")
        # what the messages of a start and of a save are made of; a number that is none is looked at more closely
        plain = type(value) is wanted and (wanted in _SCALARS or (wanted is float and value == value))  # noqa: PLR0124
        values[name] = value if plain else _checked(value, wanted, f"{message.__name__}.{name}")
    try:
        return message(**values)
    except TypeError as error:
        raise MessageError(f"{message.__name__}: {error}") from None


def _checked(value: Any, wanted: Any, where: str) -> Any:
    """Return `value` as the type `wanted`, which is one that messages may have.

    Raises:
        MessageError: it is something else.

    """
    if wanted is Any:
        return value if type(value) in _SCALARS else _checked_document(value, where, _MAX_DEPTH)
    if wanted is str and type(value) is str:  # keys of documents: the most frequent case of all
        return value
    origin = typing.get_origin(wanted)
    if origin is tuple and isinstance(value, list):
        return tuple(_checked(item, typing.get_args(wanted)[0], where) for item in value)
    if origin is dict and isinstance(value, dict):
        key_type, item_type = typing.get_args(wanted)
        return {_checked(k, key_type, where): _checked(v, item_type, where) for k, v in value.items()}
    if origin is types.UnionType:
        return _checked_union(value, typing.get_args(wanted), where)
    if isinstance(wanted, type) and origin is None:
        return _checked_plain(value, wanted, where)
    raise MessageError(f"{where}: {_kind_of(value)} where {wanted} is due")


def _checked_union(value: Any, alternatives: tuple[Any, ...], where: str) -> Any:
    if type(value) in _SCALARS and type(value) in alternatives:  # an administrator's request has thirty of them
        return value
    for alternative in alternatives:
        if alternative is type(None):
            if value is None:
                return None
            continue
        try:
            return _checked(value, alternative, where)
        except MessageError:
            continue
    raise MessageError(f"{where}: {_kind_of(value)} is none of the allowed types")


def _checked_document(value: Any, where: str, depth: int) -> Any:
    """Return `value` if it is what a document may hold: plain values, lists, and maps with text for keys."""
    if not depth:
        raise MessageError(f"{where}: more than {_MAX_DEPTH} levels")
    if type(value) is list:
        return [_checked_document(item, where, depth - 1) for item in value]
    if type(value) is dict:
        return {_checked_plain(k, str, where): _checked_document(v, where, depth - 1) for k, v in value.items()}
    if value is None:
        return None
    if type(value) in (bool, int, float, str, bytes):
        return _checked_plain(value, type(value), where)
    raise MessageError(f"{where}: {_kind_of(value)} in a document")


def _checked_enum(value: Any, wanted: type[enum.Enum], where: str) -> enum.Enum:
    """Return the member; a truth value or a fraction that equals its number is something else."""
    if type(value) not in {type(member.value) for member in wanted}:
        raise MessageError(f"{where}: {_kind_of(value)} where {wanted.__name__} is due")
    try:
        return wanted(value)
    except ValueError:
        raise MessageError(f"{where}: {str(value)[:40]!r} is no {wanted.__name__}") from None


def _checked_plain(value: Any, wanted: type, where: str) -> Any:
    if issubclass(wanted, enum.Enum):
        return _checked_enum(value, wanted, where)
    if dataclasses.is_dataclass(wanted):
        if not isinstance(value, dict):
            raise MessageError(f"{where}: {_kind_of(value)} where {wanted.__name__} is due")
        return _construct(wanted, typing.get_type_hints(wanted), value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise MessageError(f"{where}: {_kind_of(value)} where {wanted.__name__} is due")
    if isinstance(value, float) and math.isnan(value):
        raise MessageError(f"{where}: not a number")
    return value


def _kind_of(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _plain(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return _plain_fields(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return value


def _plain_fields(message: Any) -> dict[str, Any]:
    later = _later_fields(type(message))  # type: ignore[arg-type] # a class is hashable
    values = {}
    for name in message.__dataclass_fields__:
        value = getattr(message, name)
        if name in later and value == later[name]:
            continue  # a peer of an earlier release does not know it
        values[name] = value if type(value) in _SCALARS else _plain(value)
    return values


@functools.cache
def _later_fields(kind: Any) -> Mapping[str, Any]:
    """Return the fields that were added with `later`, and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(kind) if "later" in field.metadata}

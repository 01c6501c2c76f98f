"""How fixed-size records are declared: once, as a dataclass whose fields name their wire code.

All integers are big-endian, without alignment. docs/format.md is printed from these declarations.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, Self
from uuid import UUID

_UUID_CODE = "U"  # ours: 16 bytes, RFC 9562 order


def wire(code: str, meaning: str) -> Any:
    """Declare one field: `code` is a struct code, or "U" for a UUID; `meaning` goes into the document."""
    return field(metadata={"code": code, "meaning": meaning})


@dataclass(frozen=True, slots=True)
class FieldRow:
    """One line of a layout table; offset and size in bytes."""

    offset: int
    size: int
    name: str
    meaning: str


@dataclass(frozen=True, slots=True)
class _Plan:
    codec: struct.Struct
    values: Callable[[Any], tuple[Any, ...]]
    parse: tuple[Callable[[Any], Any] | None, ...]


def _uuid(raw: bytes) -> UUID:
    return UUID(bytes=raw)


def _struct_code(code: str) -> str:
    return "16s" if code == _UUID_CODE else code


_PLANS: dict[type["WireRecord"], _Plan] = {}


def _plan(record: type["WireRecord"]) -> _Plan:
    known = _PLANS.get(record)
    if known is not None:
        return known
    declared = [(item.name, str(item.metadata["code"])) for item in fields(record)]
    assert len(declared) > 1, "attrgetter gives a tuple for two names or more"
    plan = _PLANS[record] = _Plan(
        codec=struct.Struct(">" + "".join(_struct_code(code) for _, code in declared)),
        values=attrgetter(*(f"{name}.bytes" if code == _UUID_CODE else name for name, code in declared)),
        parse=tuple(_uuid if code == _UUID_CODE else None for _, code in declared),
    )
    return plan


@dataclass(frozen=True, slots=True)
class WireRecord:
    """Base of every fixed-size record on disk; subclasses only declare fields with `wire`."""

    @classmethod
    def codec(cls) -> struct.Struct:
        """Give the compiled layout."""
        return _plan(cls).codec

    @classmethod
    def size(cls) -> int:
        """Count the bytes on disk."""
        return _plan(cls).codec.size

    @classmethod
    def unpack(cls, raw: bytes | bytearray | memoryview, offset: int = 0) -> Self:
        """Read the record at `offset`; the caller has checked that enough bytes are there."""
        plan = _plan(cls)
        values = plan.codec.unpack_from(raw, offset)
        return cls(*(read(value) if read else value for read, value in zip(plan.parse, values, strict=True)))

    def pack(self) -> bytes:
        """Write the record as it stands on disk."""
        plan = _plan(type(self))
        return plan.codec.pack(*plan.values(self))

    @classmethod
    def table(cls) -> list[FieldRow]:
        """List offsets, sizes and meanings of all fields, for docs/format.md."""
        rows: list[FieldRow] = []
        offset = 0
        for item in fields(cls):
            size = struct.calcsize(">" + _struct_code(item.metadata["code"]))
            rows.append(FieldRow(offset, size, item.name, item.metadata["meaning"]))
            offset += size
        return rows

"""The messages of a protocol as a table for docs/protocol.md."""

import dataclasses
import inspect
import typing
from typing import Any

from message_strategies import kinds

from frontend_backend.messages import Protocol


def table(protocol: Protocol) -> str:
    """Return one line for each message: its name, its fields with their types and defaults, what it says."""
    lines = [f"Version {protocol.version}.", "", "| message | fields | meaning |", "|---|---|---|"]
    for kind in kinds(protocol):
        hints = typing.get_type_hints(kind)
        fields = [_field(field, hints[field.name]) for field in dataclasses.fields(kind)]
        meaning = " ".join((inspect.getdoc(kind) or "").split())
        lines.append(f"| {kind.__name__} | {', '.join(fields) or '-'} | {meaning} |")
    return "\n".join(lines) + "\n"


def _field(field: "dataclasses.Field[Any]", wanted: Any) -> str:
    name = wanted.__name__ if isinstance(wanted, type) and not typing.get_args(wanted) else str(wanted)
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    default = " = {}" if field.default_factory is not dataclasses.MISSING else default
    secret = "" if field.repr else " (secret)"
    return f"`{field.name}: {_short(name)}{default}`{secret}".replace("|", "or")


def _short(name: str) -> str:
    for prefix in ("frontend_backend.messages_keeper.", "frontend_backend.messages_instance.", "typing."):
        name = name.replace(prefix, "")
    return name

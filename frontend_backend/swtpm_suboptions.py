"""The `name=value,name,...` words that most of swtpm's options take. Pure: text in, values out.

Source: swtpm's options.c; reference/swtpm-libtpms-qemu.md 3.1.
"""

import re
from collections.abc import Mapping
from typing import Final

_NUMBER: Final = re.compile(r"\s*[+-]?[0-9]+")
_OCTAL: Final = re.compile(r"\s*\+?[0-7]+")
_INT_MAX: Final = 2**31 - 1
_UINT_MAX: Final = 2**32 - 1
_MODE_MAX: Final = 0o777

Value = str | int | bool
# What each sub-option takes: "str", "int", "uint", "bool", "mode" (octal), "id" (a number, or a name to be looked up).
Kinds = Mapping[str, str]


class OptionError(Exception):
    """The command line is not one of swtpm's. `usage`: the summary of the options is wanted with it."""

    def __init__(self, text: str, *, usage: bool = False) -> None:
        super().__init__(text)
        self.usage = usage


def sub_options(text: str, kinds: Kinds, what: str) -> dict[str, Value]:
    """Return the values in `text` by name; of one that is there twice the first counts, as with swtpm.

    Raises:
        OptionError: a name is unknown or a value is none of its kind; `what` is named in it.

    """
    values: dict[str, Value] = {}
    for token in _tokens(text, what):
        name, equals, value = token.partition("=")
        if name not in kinds or (equals and not value):
            raise OptionError(f"Error parsing {what} options: Unknown option '{token}'")
        converted = _converted(kinds[name], value if equals else "true", what)
        values.setdefault(name, converted)
    return values


def _tokens(text: str, what: str) -> list[str]:
    """Split at commas, but not within a JSON map that is a value. Nothing between two commas is nothing (swtpm 0.7)."""
    tokens = []
    rest: str | None = text
    while rest is not None:
        end = _end_of_token(rest, what)
        tokens.append(rest[:end])
        rest = rest[end + 1 :] if end < len(rest) else None
    return [token for token in tokens if token]


def _end_of_token(text: str, what: str) -> int:
    comma = text.find(",")
    end = len(text) if comma < 0 else comma
    equals = text.find("=", 0, end)
    if equals < 0 or text[equals + 1 : equals + 2] != "{":
        return end
    depth = 0
    for position in range(equals + 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            if text[position + 1 : position + 2] not in ("", ","):
                raise OptionError(f"Error parsing {what} options: Unexpected character following JSON map.")
            return position + 1
    raise OptionError(f"Error parsing {what} options: Unterminated JSON map.")


def _converted(kind: str, value: str, what: str) -> Value:
    if kind == "bool":
        return value.lower() in ("true", "1")
    if kind == "mode":
        return _mode(value, what)
    if kind in ("int", "uint"):
        return number(value, what, _INT_MAX if kind == "int" else _UINT_MAX)
    if kind == "id" and _NUMBER.fullmatch(value):
        return number(value, what, _UINT_MAX)
    return value


def number(text: str, what: str, largest: int) -> int:
    """Return a decimal number that a C int or unsigned int can hold. Raises OptionError."""
    if not _NUMBER.fullmatch(text):
        raise OptionError(f"Error parsing {what} options: invalid number '{text}'")
    found = int(text)
    smallest = -largest - 1 if largest == _INT_MAX else 0
    if not smallest <= found <= largest:
        raise OptionError(f"Error parsing {what} options: number {found} outside valid range")
    return found


def _mode(text: str, what: str) -> int:
    if not _OCTAL.fullmatch(text):
        raise OptionError(f"Error parsing {what} options: invalid mode type '{text}'")
    mode = int(text, 8)
    if mode > _MODE_MAX:
        raise OptionError(f"Error parsing {what} options: mode {text} is invalid")
    return mode


def text_of(values: Mapping[str, Value], name: str) -> str | None:
    """Return a text, None where it is missing."""
    value = values.get(name)
    return None if value is None else str(value)


def whole(values: Mapping[str, Value], name: str) -> int | None:
    """Return a number, None where it is missing or negative: swtpm takes -1 for "not said"."""
    value = values.get(name)
    return value if isinstance(value, int) and value >= 0 else None


def identity(values: Mapping[str, Value], name: str) -> int | str | None:
    """Return a user or group as a number or name, None where it is missing."""
    value = values.get(name)
    assert not isinstance(value, bool)
    return value


def yes(values: Mapping[str, Value], name: str) -> bool:
    """Tell whether a boolean is there and true."""
    return values.get(name) is True

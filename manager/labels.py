"""Labels of vTPMs: KEY=VALUE, for people and their tools. Nothing is decided by them."""

import re
from collections.abc import Mapping, Sequence
from typing import Final

from manager.errors import UsageError

MAX_LABELS: Final = 32  # of one vTPM: a document with all of them fits into a datagram many times over
MAX_KEY: Final = 63  # characters, as names of DNS labels and of Kubernetes' labels have
MAX_VALUE: Final = 100  # characters
_KEY: Final = re.compile(rf"[A-Za-z0-9](?:[A-Za-z0-9._/-]{{0,{MAX_KEY - 2}}}[A-Za-z0-9])?")
_VALUE: Final = re.compile(rf"[ -+\--~]{{0,{MAX_VALUE}}}")  # printable ASCII without the comma, which parts labels


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """Return labels written KEY=VALUE.

    Raises:
        UsageError: one is not of that form, a key comes twice, or they are too many.

    """
    labels: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not _VALUE.fullmatch(value):
            raise UsageError(
                f"'{text[:80]}' is no label: write KEY=VALUE, the value up to {MAX_VALUE} printable ASCII characters "
                f"without a comma"
            )
        if check_key(key) in labels:
            raise UsageError(f"the label '{key}' is given twice")
        labels[key] = value
    check_count(labels)
    return labels


def check_key(key: str) -> str:
    """Return a label's key. Raises UsageError."""
    if not _KEY.fullmatch(key):
        raise UsageError(
            f"'{key[:80]}' is no key of a label: 1 to {MAX_KEY} of A-Z a-z 0-9 . _ / -, letters or digits at its ends"
        )
    return key


def check_count(labels: Mapping[str, str]) -> None:
    """Refuse more labels than a vTPM may have. Raises UsageError."""
    if len(labels) > MAX_LABELS:
        raise UsageError(f"{len(labels)} labels: a vTPM has at most {MAX_LABELS}")


def parse_filters(texts: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    """Return what labels a listing asks for: KEY=VALUE, or KEY with any value (None). Raises UsageError."""
    filters: list[tuple[str, str | None]] = []
    for text in texts:
        key, equals, value = text.partition("=")
        if equals and not _VALUE.fullmatch(value):
            raise UsageError(f"'{text[:80]}' is no label: no vTPM can have it")
        filters.append((check_key(key), value if equals else None))
    if len(filters) > MAX_LABELS:
        raise UsageError(f"{len(filters)} labels: a vTPM has at most {MAX_LABELS}")
    return tuple(filters)


def flat(labels: Mapping[str, str]) -> str | None:
    """Return labels as documents show them: KEY=VALUE,KEY=VALUE, by key; None where there are none."""
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items())) or None

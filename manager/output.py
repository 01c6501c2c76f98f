"""What commands print: JSON documents, JSON lines, ids, or tables for people. Pure: documents in, text out."""

import json
from collections.abc import Sequence
from typing import Any

from manager.verb_table import Verb

Document = dict[str, Any]


def as_json(documents: Sequence[Document], *, many: bool) -> str:
    """Return one JSON document: an object, or an array for verbs that list."""
    return json.dumps(list(documents) if many else documents[0], indent=2, sort_keys=False)


def as_json_lines(documents: Sequence[Document]) -> str:
    """Return one JSON object a line."""
    return "\n".join(json.dumps(document) for document in documents)


def as_table(documents: Sequence[Document], columns: Sequence[str]) -> str:
    """Return a table with a head line, columns as wide as their widest value."""
    rows = [[_cell(document.get(column)) for column in columns] for document in documents]
    head = [column.upper() for column in columns]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return "\n".join(line.rstrip() for line in lines)


def as_fields(document: Document) -> str:
    """Return one field a line, for a single document."""
    shown = {key: _cell(value) for key, value in document.items() if key != "schema"}
    width = max(len(key) for key in shown)
    return "\n".join(f"{key.ljust(width)}  {value}".rstrip() for key, value in shown.items())


def render(verb: Verb, documents: Sequence[Document], form: str) -> str:
    """Return the text of an answer; `form` is "json", "jsonl", "quiet" or "people"."""
    if form == "json":
        return as_json(documents, many=verb.many)
    if form == "jsonl":
        return as_json_lines(documents)
    if form == "quiet" or (verb.terse and form == "people"):
        return "\n".join(str(document[verb.prints]) for document in documents)
    if verb.many:
        return as_table(documents, verb.columns)
    return as_fields(documents[0]) if documents else ""


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)

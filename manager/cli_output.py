"""Prints an answer as it comes: lines at once where a form allows it, whole documents and tables at the end."""

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final

from frontend_backend.command_line import stop_if_enough
from frontend_backend.messages_admin import ExitCode
from manager.new_file import write_new
from manager.output import Document, as_table, render
from manager.verb_table import Verb

_PAGER: Final = "less"
_LESS_OPTIONS: Final = "FRX"  # as git does: short output is only printed, and stays on the screen
_SHOWN_OK: Final = 20  # judgements that are shown although nothing is wrong


def print_answer(verb: Verb, documents: Iterable[Document], form: str, *, paged: bool = True) -> int:
    """Print the documents of `verb` in `form` ("json", "jsonl", "quiet" or "people"); returns the exit code.

    "jsonl" and ids are printed line by line, so that no answer is too long. Tables are shown by a pager where
    `paged` is set and standard output is a terminal.

    Raises:
        ReaderGoneError: the reader of what is printed line by line has seen enough.
        OutputError: standard output cannot be written.

    """
    if form == "jsonl":
        codes = [_print_line(verb, json.dumps(document), document) for document in documents]
        return _worst(codes)
    if form == "quiet" or (verb.terse and form == "people"):
        codes = [_print_line(verb, _id_of(verb, row), row) for row in documents]
        return _worst(codes)
    answer = list(documents)
    text = _judgements(verb, answer) if verb.judges and form == "people" else render(verb, answer, form)
    if text:
        show(text, paged=paged and verb.many and form == "people")
    return _worst(_code(verb, document) for document in answer)


def _id_of(verb: Verb, document: Document) -> str | None:
    """Return what is printed of a document where ids are wanted; None for nothing, as an endpoint in another domain."""
    value = None if verb.judges else document[verb.prints]
    return None if value is None else str(value)


def saved(verb: Verb, path: str, documents: Iterable[Document]) -> Iterator[Document]:
    """Write what `verb` saves to a new file, and let the documents pass with its name in `output` instead.

    Raises:
        ConflictError: the file is there already. ManagerError: it cannot be written.

    """
    for document in documents:
        content = str(document[verb.saves])
        write_new(path, bytes.fromhex(content) if verb.saves_as == "bytes" else content.encode())
        yield {name: value for name, value in document.items() if name != verb.saves} | {"output": path}


def _print_line(verb: Verb, text: str | None, document: Document) -> int:
    if text is not None:
        print(text)
        stop_if_enough()
    return _code(verb, document)


def _code(verb: Verb, document: Document) -> int:
    return int(document["code"]) if verb.judges else int(ExitCode.OK)


def _worst(codes: Iterable[int]) -> int:
    """Return the exit code of many: integrity above all, else any that is not 0."""
    seen = set(codes)
    return int(ExitCode.INTEGRITY) if ExitCode.INTEGRITY in seen else max(seen, default=int(ExitCode.OK))


def _judgements(verb: Verb, documents: Sequence[Document]) -> str:
    """Return a table of what is wrong, of everything where that is little, and a line that counts."""
    counts = Counter(str(document["verdict"]) for document in documents)
    wrong = [document for document in documents if document["code"] != ExitCode.OK]
    shown = documents if len(documents) - len(wrong) <= _SHOWN_OK else wrong
    summary = f"{len(documents)} checks: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return "\n".join([as_table(shown, verb.columns), "", summary] if shown else [summary])


def show(text: str, *, paged: bool) -> None:
    """Print `text`, through $PAGER (default: less) if `paged` and standard output is a terminal.

    PAGER="" or "cat" means no pager; one that cannot be started is done without.

    Raises:
        OutputError: standard output cannot be written.

    """
    pager = shlex.split(os.environ.get("PAGER", _PAGER))
    if paged and pager not in ([], ["cat"]) and sys.stdout.isatty():
        environment = {"LESS": _LESS_OPTIONS} | os.environ
        with suppress(FileNotFoundError, PermissionError):  # no such program: printed below
            subprocess.run(pager, input=f"{text}\n", text=True, env=environment, check=False)
            return
    print(text)

"""What a benchmark hands back, and how it is printed: as text on the terminal, as Markdown in docs/benchmarks.md.

Results are kept in docs/benchmarks.json, a section each with the circumstances of its own run; the document is made
from there. So a run of one benchmark replaces its section and leaves the others as they are.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Target:
    """One number of design section 10: what was measured, and what it may be at most, or must be `at_least`."""

    what: str
    measured: float
    limit: float
    peer: str
    spread: str = ""
    at_least: bool = False

    @property
    def held(self) -> bool:
        """Whether the number holds."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def cells(self) -> tuple[str, ...]:
        """The target's row in the summary."""
        measured = _short(self.measured)
        spread = f" ({self.spread})" if self.spread else ""
        limit = f"{'at least' if self.at_least else 'at most'} {_short(self.limit)}"
        return self.what, self.peer, measured + spread, limit, "held" if self.held else "**missed**"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number == int(number) else f"{number:.2f}".removesuffix("0")


@dataclass(slots=True)
class Table:
    """A table with a head line; `note` stands above it."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    note: str = ""

    def add(self, *cells: str) -> None:
        """Add a row."""
        assert len(cells) == len(self.head), "as many cells as the head has"
        self.rows.append(cells)


@dataclass(frozen=True, slots=True)
class Figure:
    """A drawing in docs/, which `drawings.DRAW` makes from its section's data."""

    file: str
    caption: str


@dataclass(slots=True)
class Section:
    """One benchmark's results. `method` says what was done, `meaning` what follows from the numbers.

    `data` is what figures are drawn from: what JSON can hold.
    """

    title: str
    method: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    meaning: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Run:
    """The circumstances of a section's run: the machine, and a line on this run alone."""

    machine: tuple[str, ...]
    line: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A section as it is kept, with its run."""

    run: Run
    section: Section

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> Self:
        """Make it from what JSON gives."""
        run, section = tree["run"], tree["section"]
        return cls(
            Run(tuple(run["machine"]), run["line"]),
            Section(
                title=section["title"],
                method=section["method"],
                tables=[
                    Table(tuple(table["head"]), [tuple(row) for row in table["rows"]], table["note"])
                    for table in section["tables"]
                ],
                targets=[Target(**target) for target in section["targets"]],
                meaning=section["meaning"],
                figures=[Figure(**figure) for figure in section["figures"]],
                data=section["data"],
            ),
        )


def load_entries(path: Path) -> dict[str, Entry]:
    """Read what earlier runs left, by the names of benchmarks; nothing where there is no file."""
    if not path.exists():
        return {}
    return {name: Entry.read(tree) for name, tree in json.loads(path.read_text(encoding="utf-8")).items()}


def save_entries(path: Path, entries: Mapping[str, Entry]) -> None:
    """Write all results."""
    tree = {name: asdict(entry) for name, entry in entries.items()}
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def replaced(entries: Mapping[str, Entry], name: str, entry: Entry, order: Sequence[str]) -> dict[str, Entry]:
    """Return `entries` with that of one benchmark replaced, in the order of benchmarks; no other is lost."""
    known = dict(entries) | {name: entry}
    return {one: known[one] for one in (*order, *(one for one in known if one not in order)) if one in known}


SUMMARY_HEAD = ("number", "compared with", "measured", "limit", "", "benchmark")


_INTRODUCTION = (
    "Written by `./dev bench`, from `benchmarks.json`; do not edit. `./dev bench NAME` measures one of them and "
    "replaces its section; each says when and on which commit it was measured. `./dev bench --list` names them."
)


def as_markdown(noise: str, entries: Mapping[str, Entry]) -> str:
    """Return the whole document: targets first, then a section for each benchmark."""
    lines = ["# Benchmarks", "", _INTRODUCTION]
    machines = list(dict.fromkeys(entry.run.machine for entry in entries.values()))
    for machine in machines:
        whose = [f"`{name}`" for name, entry in entries.items() if entry.run.machine == machine]
        lines += ["", *([f"{', '.join(whose)}:", ""] if len(machines) > 1 else []), *(f"- {line}" for line in machine)]
    rows = [(*target.cells, f"`{name}`") for name, entry in entries.items() for target in entry.section.targets]
    contents = [f"[{entry.section.title}](#{_anchor(entry.section.title)})" for entry in entries.values()]
    lines += ["", "Below: " + " · ".join(["[the targets](#the-targets)", *contents])]
    lines += ["", "## The targets", "", *_markdown_table(Table(SUMMARY_HEAD, rows)), "", noise]
    for name, entry in entries.items():
        lines += _markdown_section(name, entry)
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    """Return what a heading is linked by."""
    kept = "".join(character for character in title.lower() if character.isalnum() or character in " -")
    return kept.replace(" ", "-")


def _markdown_section(name: str, entry: Entry) -> list[str]:
    section = entry.section
    lines = ["", f"## {section.title}", "", f"`./dev bench {name}`: {entry.run.line}", "", section.method]
    for figure in section.figures:
        lines += ["", f"![{figure.caption}]({figure.file})"]
    for table in section.tables:
        lines += ["", *([table.note, ""] if table.note else []), *_markdown_table(table)]
    for paragraph in section.meaning:
        lines += ["", paragraph]
    return lines


def _markdown_table(table: Table) -> list[str]:
    return [_line(table.head), _line(("---",) * len(table.head)), *map(_line, table.rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def as_text(section: Section) -> str:
    """Return a section for the terminal: its tables, its targets, its sentences."""
    lines = [section.title]
    for table in section.tables:
        lines += ["", *([table.note] if table.note else []), *_plain_table(table)]
    if section.targets:
        rows = [target.cells for target in section.targets]
        lines += ["", *_plain_table(Table(SUMMARY_HEAD[:-1], rows))]
    lines += ["", *section.meaning]
    return "\n".join(lines).replace("**", "") + "\n"


def _plain_table(table: Table) -> list[str]:
    everything = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(table.head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in everything
    ]

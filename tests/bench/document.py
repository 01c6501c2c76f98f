"""What a benchmark hands back, and how it is printed: as text on the terminal, as Markdown in docs/benchmarks.md."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Target:
    """One number of design section 10: what was measured, and what it may be at most."""

    what: str
    measured: float
    limit: float
    peer: str
    spread: str = ""

    @property
    def held(self) -> bool:
        """Whether the number holds."""
        return self.measured <= self.limit

    @property
    def cells(self) -> tuple[str, ...]:
        """The target's row in the summary."""
        measured = f"{self.measured:g}" if self.measured == int(self.measured) else f"{self.measured:.2f}"
        spread = f" ({self.spread})" if self.spread else ""
        return self.what, self.peer, measured + spread, f"{self.limit:g}", "held" if self.held else "**missed**"


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


@dataclass(slots=True)
class Section:
    """One benchmark's results. `method` says what was done, `meaning` what follows from the numbers."""

    title: str
    method: str
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    meaning: list[str] = field(default_factory=list)


SUMMARY_HEAD = ("number", "compared with", "measured", "at most", "")


def as_markdown(surroundings: Sequence[str], noise: str, sections: Sequence[Section]) -> str:
    """Return the whole document."""
    lines = ["# Benchmarks", "", "Written by `./dev bench`; every run of all benchmarks rewrites it.", ""]
    lines += [f"- {line}" for line in surroundings]
    summary = Table(SUMMARY_HEAD, [target.cells for section in sections for target in section.targets])
    lines += ["", "## The targets", "", *_markdown_table(summary), "", noise]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.method]
        for table in section.tables:
            lines += ["", *([table.note, ""] if table.note else []), *_markdown_table(table)]
        for paragraph in section.meaning:
            lines += ["", paragraph]
    return "\n".join(lines) + "\n"


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
        lines += ["", *_plain_table(Table(SUMMARY_HEAD, rows))]
    lines += ["", *section.meaning]
    return "\n".join(lines).replace("**", "") + "\n"


def _plain_table(table: Table) -> list[str]:
    everything = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(table.head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in everything
    ]

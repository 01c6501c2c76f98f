"""What ./dev bench writes: a run of one benchmark leaves the others' results, and the document is what they give."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).with_name("bench")
DOCS = BENCH.parents[1] / "docs"
sys.path.insert(0, str(BENCH))

import document as doc  # noqa: E402 - beside the benchmarks
import drawings  # noqa: E402
import plots  # noqa: E402
import plots_instance  # noqa: E402

KEPT = doc.load_entries(DOCS / "benchmarks.json")


def entry(title: str, measured: float = 1.0, commit: str = "abc") -> doc.Entry:
    table = doc.Table(("", "us"), [("one", "1.0")], note="Times:")
    section = doc.Section(
        title,
        "How it was done.",
        tables=[table],
        targets=[doc.Target(f"number of {title}", measured, 2.0, "a peer", "1 to 3")],
        meaning=["What follows."],
        figures=[doc.Figure("a.svg", "a figure")],
        data={"sizes": [1, 2.5]},
    )
    return doc.Entry(doc.Run(("machine: one",), f"today, commit {commit}"), section)


def test_a_run_of_one_replaces_its_own_results_and_keeps_the_others(tmp_path: Path) -> None:
    file, order = tmp_path / "results.json", ["store", "save"]
    doc.save_entries(file, doc.replaced({}, "save", entry("Saves", commit="old"), order))
    doc.save_entries(file, doc.replaced(doc.load_entries(file), "store", entry("Stores"), order))
    doc.save_entries(file, doc.replaced(doc.load_entries(file), "save", entry("Saves", commit="new"), order))
    assert doc.load_entries(file) == {"store": entry("Stores"), "save": entry("Saves", commit="new")}
    assert list(doc.load_entries(file)) == order


def test_results_of_a_benchmark_that_is_not_known_are_kept() -> None:
    before = {"of-another-branch": entry("Others")}
    assert list(doc.replaced(before, "save", entry("Saves"), ["save"])) == ["save", "of-another-branch"]


@pytest.mark.parametrize(
    ("measured", "limit", "at_least", "held"),
    [(1.2, 1.2, False, True), (1.21, 1.2, False, False), (25, 25, True, True), (24.9, 25, True, False)],
)
def test_a_target_is_held_up_to_its_limit(measured: float, limit: float, at_least: bool, held: bool) -> None:
    target = doc.Target("number", measured, limit, "a peer", at_least=at_least)
    assert target.held is held
    assert target.cells[-1] == ("held" if held else "**missed**")
    assert target.cells[-2] == f"{'at least' if at_least else 'at most'} {limit}"


def test_each_section_says_how_to_measure_it_again_and_what_of_it_was_missed() -> None:
    text = doc.as_markdown("Noise.", {"save": entry("Saves", 2.5, "abc")})
    for part in ("| number of Saves | a peer | 2.5 (1 to 3) | at most 2 | **missed** | `save` |",):
        assert part in text
    assert "\n## Saves\n\n`./dev bench save`: today, commit abc\n\nHow it was done.\n" in text
    assert "![a figure](a.svg)" in text


def test_sections_of_two_machines_say_which_is_whose() -> None:
    other = doc.Entry(doc.Run(("machine: two",), "today"), entry("Saves").section)
    text = doc.as_markdown("Noise.", {"store": entry("Stores"), "save": other})
    assert "`store`:\n\n- machine: one\n" in text
    assert "`save`:\n\n- machine: two\n" in text


def test_the_document_is_what_the_results_give() -> None:
    text = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    noise = next(part for part in text.split("\n\n") if part.startswith("How noise is dealt with"))
    assert text == doc.as_markdown(noise, KEPT), "run ./dev bench --redraw"


def test_every_figure_has_its_file_and_its_drawing() -> None:
    figures = [(figure, kept.section) for kept in KEPT.values() for figure in kept.section.figures]
    assert figures
    for figure, _ in figures:
        assert (DOCS / figure.file).read_bytes().startswith(b"<?xml")
        assert figure.file in drawings.DRAW


_TIMES = {"vTPM, socket": [18.0, 17.0], "vTPM, ring": [12.0, 12.5], "swtpm, socket": [12.0, 11.0]}
_NUMBERS: dict[str, dict[str, Any]] = {
    "sizes": {
        "sizes": {
            "counts": [10, 1000],
            "flush_us": 100.0,
            "update_us": {"store": [120.0, 130.0]},
            "bytes": {"store": [100.0, 104.0]},
            "open_ms": {"store": [1.0, 20.0]},
        }
    },
    "round trips": {
        "commands": ["GetRandom", "1,000 reads"],
        "pinned": _TIMES,
        "free": _TIMES,
        "limits": {"vTPM, socket": 1.3, "vTPM, ring": 1.0},
    },
    "stacked": {
        "unit": "KiB of 1,000",
        "bars": {"instance": {"heap": 600, "stack": 24}, "swtpm": {"heap": 400, "files": 500}},
        "limit": 818.0,
        "limit_label": "limit",
    },
}


@pytest.mark.parametrize(
    ("draw", "numbers"),
    [
        (plots.store_sizes, "sizes"),
        (plots_instance.round_trips, "round trips"),
        (plots_instance.stacked, "stacked"),
    ],
)
def test_the_same_numbers_draw_the_same_file(draw: Callable[..., bytes], numbers: str) -> None:
    drawn = draw(_NUMBERS[numbers])
    assert drawn == draw(_NUMBERS[numbers])
    assert b"1,000" in drawn, "text stays text"


def test_other_numbers_draw_another_file() -> None:
    more = _NUMBERS["stacked"] | {"bars": {"instance": {"heap": 900, "stack": 24}, "swtpm": {"heap": 400}}}
    assert plots_instance.stacked(more) != plots_instance.stacked(_NUMBERS["stacked"])

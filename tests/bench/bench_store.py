"""The store alone: size, opening, updates and groups of them, beside one flush of this disk, raw SQLite and LMDB."""

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

import bench_store_sizes as sizes
from document import Section, Table, Target
from options import Options, progress
from store_parties import BLOCK, GROUPS, Floor, LmdbParty, Load, Party, SqliteParty, StoreParty, time_all, updating
from subjects import scratch
from timing import MICROSECONDS, MILLISECONDS, Call, Ratio, Sample

VTPMS: Final = 20_000
IMAGE_LIMIT: Final = 2 * 1024 * 1024
LARGE: Final = 4 * IMAGE_LIMIT  # room to rewrite every leaf at once
OPEN_LIMIT_MS: Final = 50.0
UPDATE_LIMIT: Final = 1.2
GAIN: Final = 25
MEMORY_LIMIT: Final = 1024  # bytes for each vTPM
SIZES: Final = (10, 100, 1000)
FLOOR, SMALL, BIG, SQLITE, LMDB = "one flush", "store, 2 MiB", "store, 8 MiB", "SQLite WAL", "LMDB"
_KEEPERS: Final = (SMALL, BIG, SQLITE, LMDB)
_ROUNDS, _EACH, _GROUP_EACH, _OPENINGS = 5, 768, 12, 9  # of 768 updates and of 4 groups, 8 MiB has a checkpoint
_BUDGET, _GROUP_BUDGET = 10.0, 4.0  # seconds after which no round begins


class _Bed:
    """All parties on one disk."""

    def __init__(self, disk: Path, stack: ExitStack) -> None:
        self.load = Load(VTPMS)
        self.small, self.big = (
            stack.enter_context(closing(StoreParty(disk / f"store-{size}", self.load, size)))
            for size in (IMAGE_LIMIT, LARGE)
        )
        self.flushes: dict[str, dict[str, float]] = {}
        self.floor = stack.enter_context(Floor(disk / "floor"))
        self._keepers: dict[str, Party] = {
            SMALL: self.small,
            BIG: self.big,
            SQLITE: stack.enter_context(closing(SqliteParty(disk / "sqlite", self.load))),
            LMDB: stack.enter_context(closing(LmdbParty(disk / "lmdb", self.load))),
        }

    @contextmanager
    def counting(self, size: int, *, same: bool) -> Iterator[None]:
        """Note in `flushes` how many flushes each of the stores has for one commit meanwhile."""
        stores = {SMALL: self.small.store, BIG: self.big.store}
        before = {name: store.statistics() for name, store in stores.items()}
        yield
        after = {name: store.statistics() for name, store in stores.items()}
        self.flushes[_named(size, same)] = {
            name: (after[name].flushes - before[name].flushes) / (after[name].commits - before[name].commits)
            for name in stores
        }

    def calls(self, count: int, *, same: bool = False) -> dict[str, Call]:
        """Return a call for each party that durably updates `count` vTPMs; with `same`, always the same ones."""
        return {name: updating(party, self.load, count, same=same) for name, party in self._keepers.items()}


def run(options: Options) -> Section:
    """Measure and return the section."""
    rounds = options.rounds(_ROUNDS)
    with scratch() as disk, ExitStack() as stack:
        progress(f"store: {VTPMS} vTPMs in {GROUPS} groups, four times")
        bed = _Bed(disk, stack)
        openings = bed.small.openings(options.rounds(_OPENINGS))
        memory = bed.small.memory()
        progress("store: single updates")
        before = _singles(bed, rounds, options)
        groups: dict[tuple[int, bool], dict[str, Sample]] = {}
        for size, same in [*((size, False) for size in SIZES), (SIZES[-1], True)]:
            progress(f"store: groups of {size}, {'the same' if same else 'by chance'}")
            with bed.counting(size, same=same):
                groups[size, same] = time_all(
                    bed.calls(size, same=same), rounds, options.each(_GROUP_EACH), budget=_GROUP_BUDGET
                )
        progress("store: single updates again")
        after = _singles(bed, rounds, options)  # groups were between, so that a quick or slow while meets both
        singles = {name: Sample(before[name].rounds + after[name].rounds) for name in before}
        image_bytes = bed.small.bytes
    section = _section(image_bytes, openings, memory, singles, groups)
    section.tables.append(_flush_table(bed.flushes))
    sizes.add(section, options)
    return section


def _singles(bed: _Bed, rounds: int, options: Options) -> dict[str, Sample]:
    return time_all({FLOOR: bed.floor} | bed.calls(1), rounds, options.each(_EACH), budget=_BUDGET)


def _section(
    image_bytes: int,
    openings: Sample,
    memory: float,
    singles: dict[str, Sample],
    groups: dict[tuple[int, bool], dict[str, Sample]],
) -> Section:
    section = Section(
        "The store alone",
        f"{VTPMS} vTPMs in {GROUPS} groups, once in an image of 2 MiB, which they fill, once in one of 8 MiB. Updates "
        f"replace records chosen by chance. *One flush* is (write {BLOCK} bytes to a written file, fdatasync). "
        "SQLite updates the same rows in WAL mode with synchronous=FULL, one flush a commit; LMDB the same as it is by "
        "default (sync, metasync), two flushes a commit; both without encryption, authentication or groups. Records "
        "are made outside the clock; everything else, checkpoints too, is inside.",
    )
    section.tables += [_single_table(singles), _group_table(singles, groups)]
    facts = Table(("", "measured"))
    facts.add("image", f"{image_bytes} bytes, {image_bytes / VTPMS:.1f} for each vTPM")
    facts.add(
        "open, verify, index", f"{openings.median / MILLISECONDS:.1f} ms (best {openings.best / MILLISECONDS:.1f})"
    )
    facts.add("memory of an open store", f"{memory:.0f} bytes for each vTPM")
    section.tables.append(facts)
    update = Ratio.of(singles[SMALL], singles[FLOOR])
    section.targets += [
        Target("store image, bytes", image_bytes, IMAGE_LIMIT, "Xen's 2 MiB"),
        Target("open, verify and index 20,000, ms", openings.median / MILLISECONDS, OPEN_LIMIT_MS, "-"),
        Target("one durable update", update.median, UPDATE_LIMIT, "one write and flush", update.spread),
        Target("memory for each vTPM, bytes", round(memory), MEMORY_LIMIT, "-"),
    ]
    gain = sizes.mean(singles[SMALL]) / (sizes.mean(groups[SIZES[-1], False][SMALL]) / SIZES[-1])
    section.targets.append(
        Target(f"updates/s in groups of {SIZES[-1]}, by chance", gain, GAIN, "single updates", at_least=True)
    )
    section.meaning.append(_meaning())
    return section


def _single_table(singles: dict[str, Sample]) -> Table:
    table = Table(("", "median", "mean", "p99", "to one flush", "calls"), note="One durable update, microseconds:")
    for name, sample in singles.items():
        times = (f"{value / MICROSECONDS:.0f}" for value in (sample.median, sizes.mean(sample), sample.p99))
        table.add(name, *times, str(Ratio.of(sample, singles[FLOOR])), str(sample.calls))
    return table


def _group_table(singles: dict[str, Sample], groups: dict[tuple[int, bool], dict[str, Sample]]) -> Table:
    table = Table(
        (
            "records in a group",
            *(head for name in _KEEPERS for head in (f"{name}, updates/s", "to single")),
        ),
        note="Groups; *to single* is the rate as a multiple of single updates; medians of the rounds' means:",
    )
    for (size, same), samples in groups.items():
        cells = []
        for name in _KEEPERS:
            per_record = sizes.mean(samples[name]) / size
            cells += [f"{1e9 / per_record:,.0f}", f"{sizes.mean(singles[name]) / per_record:.1f}"]
        table.add(_named(size, same), *cells)
    return table


def _flush_table(flushes: dict[str, dict[str, float]]) -> Table:
    table = Table(("records in a group", SMALL, BIG), note="Flushes for a group, those of checkpoints included:")
    for name, counted in flushes.items():
        table.add(name, *(f"{counted[store]:.1f}" for store in (SMALL, BIG)))
    return table


def _named(size: int, same: bool) -> str:
    return f"{size}, {'always the same' if same else 'by chance'}"


def _meaning() -> str:
    return (
        "A thousand records chosen by chance are in about 405 of the 455 leaves, and nearly fill the log of a 2 MiB "
        "image, so each group waits for the checkpoint of the one before, which has few spare sectors and so takes "
        "many rounds with a flush each; in 8 MiB it is one round for several groups. That is what the full image "
        "costs. ADR 0003 has the parts of a single update."
    )

"""What becomes of the store's cost with its size: 20,000, 200,000 and 1,000,000 vTPMs in one run, in turns."""

import statistics
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from document import Figure, Section, Table, Target
from options import Options, progress
from store_parties import Floor, LmdbParty, Load, Party, SqliteParty, StoreParty, time_all, updating
from subjects import scratch
from timing import MICROSECONDS, MILLISECONDS, Call, Ratio, Sample

SIZES: Final = (20_000, 200_000, 1_000_000)
QUICK_SIZES: Final = (2_000, 20_000)
GROWTH_LIMIT: Final = 2.0  # time of an update at the largest size over that at the smallest
OPEN_LIMIT_MS: Final = 600.0  # with 200,000
_OPEN_TARGET: Final = 200_000
_BEGINS_WITH: Final = 2 * 1024 * 1024  # bytes of every image when it is made; it grows while vTPMs are added
_ROUNDS, _EACH, _BLOCK = 3, 2048, 16  # the largest log takes 1,792 single updates: a round has a checkpoint of each
_GROUP, _GROUP_ROUNDS, _GROUP_EACH = 1000, 3, 10  # the largest log takes 9 such groups
_OPENINGS: Final = 3
_BUDGET: Final = 20.0  # seconds after which no round begins
_FLOOR, _STORE, _SQLITE, _LMDB = "one flush", "store", "SQLite WAL", "LMDB"
_KEEPERS: Final = (_STORE, _SQLITE, _LMDB)
_PLOT: Final = "store-size.svg"


@dataclass(frozen=True, slots=True)
class _Size:
    """All parties with `count` vTPMs."""

    count: int
    load: Load
    store: StoreParty
    parties: dict[str, Party]

    @classmethod
    def make(cls, count: int, disk: Path, stack: ExitStack) -> "_Size":
        """Fill them; they are closed with `stack`."""
        load = Load(count)
        store = stack.enter_context(closing(StoreParty(disk / f"store-{count}", load, _BEGINS_WITH)))
        parties: dict[str, Party] = {
            _STORE: store,
            _SQLITE: stack.enter_context(closing(SqliteParty(disk / f"sqlite-{count}", load))),
            _LMDB: stack.enter_context(closing(LmdbParty(disk / f"lmdb-{count}", load))),
        }
        return cls(count, load, store, parties)

    def calls(self, group: int) -> dict[str, Call]:
        """Return a call of each party that durably updates `group` vTPMs chosen by chance."""
        return {_key(name, self.count): updating(party, self.load, group) for name, party in self.parties.items()}


@dataclass(frozen=True, slots=True)
class _Measured:
    """What was measured: samples by `_key`, bytes of the files as they were filled, bytes of memory for each vTPM."""

    sizes: tuple[int, ...]
    singles: dict[str, Sample]
    groups: dict[str, Sample]
    openings: dict[str, Sample]
    on_disk: dict[str, int]
    memory: dict[int, float]

    def update(self, name: str, count: int) -> float:
        """Return microseconds of one update."""
        return mean(self.singles[_key(name, count)]) / MICROSECONDS

    def opening(self, name: str, count: int) -> float:
        """Return milliseconds of opening and reading everything."""
        return self.openings[_key(name, count)].median / MILLISECONDS

    def each_bytes(self, name: str, count: int) -> float:
        """Return bytes on the disk for each vTPM."""
        return self.on_disk[_key(name, count)] / count


def _key(name: str, count: int) -> str:
    return f"{name}, {count:,}"


def mean(sample: Sample) -> float:
    """Return the median of the rounds' means, in nanoseconds.

    A median of calls would leave out the checkpoints, which belong to them; a mean of all would let one disturbed
    round of single updates make groups look better than they are.
    """
    return statistics.median(sum(times) / len(times) for times in sample.rounds)


def means_ratio(ours: Sample, peer: Sample) -> Ratio:
    """Compare the means of rounds that two samples shared."""
    ratios = [
        (sum(mine) / len(mine)) / (sum(its) / len(its)) for mine, its in zip(ours.rounds, peer.rounds, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def add(section: Section, options: Options) -> None:
    """Measure, and add tables, targets and the plot to `section`."""
    counts = QUICK_SIZES if options.quick else SIZES
    with scratch() as disk, ExitStack() as stack:
        made = []
        for count in counts:
            progress(f"store: filling store, SQLite and LMDB with {count:,}")
            made.append(_Size.make(count, disk, stack))
        floor = stack.enter_context(Floor(disk / "floor"))
        measured = _measure(made, floor, options)
    _add_tables(section, measured)
    _add_targets(section, measured)
    section.meaning.append(_meaning(measured))
    section.data["sizes"] = {
        "counts": list(measured.sizes),
        "flush_us": mean(measured.singles[_FLOOR]) / MICROSECONDS,
        "update_us": {name: [measured.update(name, count) for count in measured.sizes] for name in _KEEPERS},
        "bytes": {name: [measured.each_bytes(name, count) for count in measured.sizes] for name in _KEEPERS},
        "open_ms": {name: [measured.opening(name, count) for count in measured.sizes] for name in _KEEPERS},
    }
    section.figures.append(Figure(_PLOT, "Cost against size: time of an update, bytes of a vTPM, time to open"))


def _measure(made: list[_Size], floor: Floor, options: Options) -> _Measured:
    on_disk = {_key(name, size.count): party.bytes for size in made for name, party in size.parties.items()}
    openings: dict[str, Sample] = {}
    memory = {}
    for size in made:
        progress(f"store: opening {size.count:,}")
        calls: dict[str, Call] = {_key(name, size.count): party.read_everything for name, party in size.parties.items()}
        openings |= time_all(calls, options.rounds(_OPENINGS), 1)
        memory[size.count] = size.store.memory()
    progress("store: single updates in all sizes")
    calls = {_FLOOR: floor}
    for size in made:
        calls |= size.calls(1)
    singles = time_all(calls, options.rounds(_ROUNDS), options.each(_EACH), _BLOCK, _BUDGET)
    progress(f"store: groups of {_GROUP} in all sizes")
    calls = {}
    for size in made:
        calls |= size.calls(_GROUP)
    groups = time_all(calls, options.rounds(_GROUP_ROUNDS), options.each(_GROUP_EACH), budget=_BUDGET)
    return _Measured(tuple(size.count for size in made), singles, groups, openings, on_disk, memory)


def _add_tables(section: Section, measured: _Measured) -> None:
    table = Table(
        (
            "vTPMs",
            "",
            "bytes for each",
            "open and read all, ms",
            "one update, us",
            "to one flush",
            "groups of 1000, updates/s",
        ),
        note=(
            f"The same with more vTPMs: every image began with 2 MiB and grew. One flush took "
            f"{mean(measured.singles[_FLOOR]) / MICROSECONDS:.0f} us. Times of updates are means, checkpoints "
            "included; records are chosen by chance:"
        ),
    )
    for count in measured.sizes:
        for name in _KEEPERS:
            key = _key(name, count)
            table.add(
                f"{count:,}",
                name,
                f"{measured.each_bytes(name, count):.1f}",
                f"{measured.opening(name, count):.1f}",
                f"{measured.update(name, count):.0f}",
                str(means_ratio(measured.singles[key], measured.singles[_FLOOR])),
                f"{_GROUP * 1e9 / mean(measured.groups[key]):,.0f}",
            )
    ours = Table(("vTPMs", "image, bytes", "memory of an open store, bytes for each vTPM"), note="The store:")
    for count in measured.sizes:
        ours.add(f"{count:,}", f"{measured.on_disk[_key(_STORE, count)]:,}", f"{measured.memory[count]:.0f}")
    section.tables += [table, ours]


def _add_targets(section: Section, measured: _Measured) -> None:
    first, last = measured.sizes[0], measured.sizes[-1]
    growth = means_ratio(measured.singles[_key(_STORE, last)], measured.singles[_key(_STORE, first)])
    section.targets.append(
        Target(f"time of one update with {last:,} vTPMs", growth.median, GROWTH_LIMIT, f"with {first:,}", growth.spread)
    )
    if _OPEN_TARGET in measured.sizes:
        opening = measured.opening(_STORE, _OPEN_TARGET)
        section.targets.append(Target(f"open, verify and index {_OPEN_TARGET:,}, ms", opening, OPEN_LIMIT_MS, "-"))


def _meaning(measured: _Measured) -> str:
    growth = {
        name: measured.update(name, measured.sizes[-1]) / measured.update(name, measured.sizes[0]) for name in _KEEPERS
    }
    return (
        f"From {measured.sizes[0]:,} to {measured.sizes[-1]:,} the time of one update grows by a factor of "
        + ", ".join(f"{value:.2f} ({name})" for name, value in growth.items())
        + ". An update is one frame in the log whatever the size; what grows are the checkpoints, whose leaves are "
        "hit by fewer records each. *Open and read all* is for the store opening with every digest, decryption and "
        "the index; for SQLite and LMDB reading all rows into a dict, unchecked; all from the page cache, but for the "
        "store, which drops its pages first."
    )

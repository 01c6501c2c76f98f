"""Many vTPMs by the installed commands: vtpm-add --count, vtpm-list --jsonl, vtpm-verify --all."""

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

from document import Section, Table, Target
from e2e_rig import BIN
from options import Options, progress
from subjects import Subject, running_subject, scratch

from storage.catalogue import Catalogue
from storage.catalogue_rows import GroupRow, VtpmRow
from storage.secrets import GroupKey, StateKey, StoreKey
from storage.store import GroupRecord, PutGroup, PutVtpm, RecordFlags, Store, VtpmRecord

ADD_LIMIT: Final = 30.0  # seconds for 20,000 on the embedded TPM
_ADD_TARGET: Final = 20_000
_LARGE: Final = 200_000
_AT_ONCE: Final = 100_000  # --count takes no more
_GROUP: Final = 1000  # records and names in one commit, as the manager has them
_NOTHING: Final = bytes(32)


@dataclass(slots=True)
class _Times:
    """Seconds by step, and what came out."""

    add: float = 0.0
    catalogue: float = 0.0
    store: float = 0.0
    listing: float = 0.0
    listed: int = 0
    quiet: float = 0.0
    verify: float = 0.0
    offline: float = 0.0
    image_bytes: int = 0
    catalogue_bytes: int = 0


def run(options: Options) -> Section:
    """Measure 20,000 vTPMs and return the section."""
    return _measure(_ADD_TARGET // 20 if options.quick else _ADD_TARGET, "Many vTPMs by the commands")


def run_large(options: Options) -> Section:
    """Measure 200,000 vTPMs and return the section."""
    return _measure(_LARGE // 200 if options.quick else _LARGE, "Ten times as many vTPMs by the commands")


def _measure(count: int, title: str) -> Section:
    times = _Times()
    with running_subject() as subject:
        progress(f"many: adding {count:,}")
        for first in range(0, count, _AT_ONCE):
            some = str(min(_AT_ONCE, count - first))
            times.add += _timed(subject, "vtpm-add", "--count", some, "--first", str(first), "--name", "bulk-{:06}")[0]
        progress(f"many: listing {count:,}")
        times.listing, times.listed = _timed(subject, "vtpm-list", "--jsonl")
        times.quiet, _ = _timed(subject, "vtpm-list", "--quiet")
        progress(f"many: verifying {count:,}")
        times.verify, _ = _timed(subject, "vtpm-verify", "--all", "--jsonl")
        times.image_bytes = subject.status()["store_bytes"]
        times.catalogue_bytes = _bytes(subject.state, "catalogue.sqlite*")
        assert subject.stop() == 0, subject.tail()
        progress(f"many: verifying {count:,} offline")
        times.offline, _ = _timed(subject, "vtpm-verify", "--all", "--jsonl", "--state-dir", str(subject.state))
    progress("many: catalogue and store alone")
    times.catalogue, times.store = _alone(count)
    assert times.listed == count, f"{times.listed} of {count} vTPMs were listed"
    return _section(count, title, times)


def _timed(subject: Subject, *words: str) -> tuple[float, int]:
    """Run an installed command; return seconds and lines of its output."""
    where = () if "--state-dir" in words else ("--socket", str(subject.runtime / "admin.sock"))
    started = time.perf_counter()
    done = subprocess.run([str(BIN / words[0]), *where, *words[1:]], capture_output=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{words} ended with {done.returncode}: {done.stderr.decode()[-2000:]}")
    return seconds, done.stdout.count(b"\n")


def _bytes(directory: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in directory.glob(pattern))


def _alone(count: int) -> tuple[float, float]:
    """Return seconds that the product's catalogue and its store take for so many, each alone, as vtpm-add has them."""
    group = uuid4()
    rows = [VtpmRow(uuid4(), f"bulk-{number:06}", group, "2.0") for number in range(count)]
    with scratch() as disk:
        return _catalogue_alone(disk, group, rows), _store_alone(disk, group, rows)


def _catalogue_alone(disk: Path, group: UUID, rows: list[VtpmRow]) -> float:
    with Catalogue.create(disk / "catalogue.sqlite", bytes(32)) as catalogue:
        catalogue.add_group(GroupRow(group, "default"))
        started = time.perf_counter()
        for start in range(0, len(rows), _GROUP):
            catalogue.add_vtpms(rows[start : start + _GROUP], "added", ", TPM 2.0, group default")
        return time.perf_counter() - started


def _store_alone(disk: Path, group: UUID, rows: list[VtpmRow]) -> float:
    with (disk / "store.img").open("xb+") as file, Store.create(file.fileno(), uuid4(), StoreKey.new(), b"") as store:
        store.commit([PutGroup(GroupRecord(group), GroupKey.new())])
        started = time.perf_counter()
        for start in range(0, len(rows), _GROUP):
            some = rows[start : start + _GROUP]
            records = [VtpmRecord(row.uuid, group, StateKey(_NOTHING), _NOTHING, 0, RecordFlags.FRESH) for row in some]
            store.commit([PutVtpm(record) for record in records])
        return time.perf_counter() - started


def _section(count: int, title: str, times: _Times) -> Section:
    calls = -(-count // _AT_ONCE)
    section = Section(
        title,
        f"{count:,} vTPMs in a fresh installation on the embedded TPM, by the installed commands, each once; the clock "
        "runs from the start of the command to its end, its interpreter's start included. *Catalogue alone* and "
        "*store alone* are the product's own classes doing the same in one process, in the same groups of "
        f"{_GROUP}. The rest of `vtpm-add` is making and sending {count:,} documents, and printing them.",
    )
    table = Table(("", "seconds", "vTPMs/s"))
    named = {
        f"`vtpm-add --count`, {calls} time{'s' if calls > 1 else ''}": times.add,
        "of that: catalogue alone": times.catalogue,
        "of that: store alone": times.store,
        "`vtpm-list --jsonl`": times.listing,
        "`vtpm-list --quiet`": times.quiet,
        "`vtpm-verify --all`, by the manager": times.verify,
        "`vtpm-verify --all --state-dir`, manager stopped": times.offline,
    }
    for name, seconds in named.items():
        table.add(name, f"{seconds:.2f}", f"{count / seconds:,.0f}")
    sizes = Table(("", "bytes", "for each vTPM"))
    for name, size in (("store image", times.image_bytes), ("catalogue, events included", times.catalogue_bytes)):
        sizes.add(name, f"{size:,}", f"{size / count:.1f}")
    section.tables += [table, sizes]
    if count == _ADD_TARGET:
        section.targets.append(Target(f"vtpm-add --count {count}, seconds", times.add, ADD_LIMIT, "-"))
    section.meaning.append(
        f"The catalogue's share of adding is {100 * times.catalogue / times.add:.0f} %, the store's "
        f"{100 * times.store / times.add:.0f} %."
    )
    return section

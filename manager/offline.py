"""What works on an installation that no manager serves: verification, which opens it and changes nothing."""

import shutil
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from manager.catalogue_place import place_of
from manager.config import SYSTEM_CONFIG, SYSTEM_RUNTIME_DIR, SYSTEM_STATE_DIR, Config, Layout
from manager.errors import IntegrityError, NotFoundError, RolledBackError
from manager.findings import Finding, Subject, Verdict, stored_in
from manager.keys import catalogue_key
from manager.opening import Opened, locked_store, open_store, open_tpm
from manager.restoring import refuse_unfinished
from manager.verify import verify_all, verify_store, verify_vtpm
from storage.catalogue import Catalogue, Place
from storage.catalogue_rows import Audit, GroupRow, VtpmRow
from storage.errors import CatalogueDamaged, CatalogueForeign, CatalogueTooNew, CatalogueTooOld

SQLITE_TAILS = ("", "-wal")  # what a copy of a SQLite database in WAL mode needs (sqlite.org/wal.html)


def installation_at(state_dir: str, config: str | None) -> tuple[Layout, Config]:
    """Return where an installation lies and its configuration: `config`, else the system's, else the state's own.

    Raises:
        ConfigurationError: it cannot be read. ConflictError: a restore into it was cut short.

    """
    layout = Layout(Path(state_dir).absolute(), SYSTEM_RUNTIME_DIR)
    refuse_unfinished(layout.state_dir)
    if config:
        return layout, Config.load(Path(config))
    system = layout.state_dir == SYSTEM_STATE_DIR and SYSTEM_CONFIG.exists()
    return layout, Config.load(SYSTEM_CONFIG if system else layout.config)


@contextmanager
def opened_installation(layout: Layout, config: Config) -> Iterator[Opened]:
    """Open the hardware TPM and the store, under the store's lock; changes nothing.

    Raises:
        BusyError: a manager runs. IntegrityError, DeniedError, TpmError: see `open_store`.

    """
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        opened = open_store(descriptor, tpm, config)
        try:
            yield opened
        finally:
            opened.store.close()
            opened.secret.wipe()


def verify_offline(layout: Layout, config: Config, vtpm: str | None) -> Generator[Finding]:
    """Judge one vTPM (UUID or name), or all there is (None).

    Raises:
        BusyError: a manager runs. DeniedError, TpmError: the store's key could not be had. NotFoundError: no such vTPM.

    """
    try:
        with opened_installation(layout, config) as opened:
            audit, groups, findings = audit_catalogue(layout, config, opened)
            subject = Subject(opened.store, *stored_in(opened.store), audit, groups, layout.state_images)
            if vtpm is not None:
                yield from verify_vtpm(subject, _find(audit, vtpm))
                return
            yield from verify_store(opened.store, opened.store)
            yield from findings
            yield from verify_all(subject)
    except RolledBackError as error:
        yield Finding("store", Verdict.DISAGREES, str(error))
    except IntegrityError as error:
        yield Finding("store", Verdict.DAMAGED, str(error))


def _find(audit: Audit, text: str) -> VtpmRow:
    for row in audit.vtpms:
        if text in (row.name, str(row.uuid), row.uuid.hex):
            return row
    raise NotFoundError(f"there is no vTPM '{text[:80]}' whose row in the catalogue holds; --all shows what there is")


def audit_catalogue(layout: Layout, config: Config, opened: Opened) -> tuple[Audit, list[GroupRow], list[Finding]]:
    """Audit a copy of the catalogue: SQLite changes files that it opens, if only to clean up after a crash.

    Returns the audit, the groups' rows, and a finding where the catalogue cannot be read at all.
    """
    key, store = catalogue_key(opened.secret.store_key, opened.store.uuid), opened.store.uuid
    place = place_of(layout, config)
    if not isinstance(place, Path):
        return _audit(place, key, store, change=False)
    if not place.exists():
        return Audit([], [], []), [], [Finding("catalogue", Verdict.MISSING, f"{place} is missing")]
    with tempfile.TemporaryDirectory(prefix="vtpm-verify-") as folder:
        copy = Path(folder) / layout.catalogue.name
        for tail in SQLITE_TAILS:
            original = layout.catalogue.with_name(layout.catalogue.name + tail)
            if original.exists():
                shutil.copyfile(original, copy.with_name(copy.name + tail))
        return _audit(copy, key, store, change=True)


def _audit(place: Place, key: bytes, store: UUID, *, change: bool) -> tuple[Audit, list[GroupRow], list[Finding]]:
    try:
        with Catalogue.open(place, key, store, check_rows=False, change=change) as catalogue:
            return catalogue.audit(), catalogue.groups(), []
    except (CatalogueDamaged, CatalogueTooNew, CatalogueTooOld, CatalogueForeign) as error:
        return Audit([], [], []), [], [Finding("catalogue", Verdict.DAMAGED, str(error))]

"""`vtpm-manager rebuild-catalogue`: a catalogue out of what the store knows, beside what of the old one is authentic.

An attachment is kept if its row is authentic and the store's record vouches for it (manager.attachment_epochs).
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manager.attachment_epochs import staleness
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.durable import sync_directory
from manager.group_rows import group_row
from manager.keys import GroupSeal, catalogue_key
from manager.offline import audit_catalogue, opened_installation
from manager.opening import Opened
from storage.catalogue import Catalogue, shown
from storage.catalogue_rows import AttachmentRow, Audit, VtpmRow
from storage.errors import GroupClosed, NoSuchVtpm, StoreDamaged, StoreError
from storage.store_records import RecordFlags

_TAILS: Final = ("", "-wal", "-shm", "-journal")
_AT_ONCE: Final = 5000  # rows in one transaction


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What became of the catalogue; `attachments_lost` is None where the old one could not be read.

    Labels are lost: neither the store nor a MAC vouches for them. `old` is where the old catalogue is
    kept, `unclear` are sentences about what an administrator should look at.
    """

    groups: int
    names_kept: int
    names_made: int
    attachments_kept: int
    attachments_lost: int | None
    old: str | None
    unclear: list[str]


def rebuild_catalogue(layout: Layout, config: Config) -> Rebuilt:
    """Make the catalogue anew and keep the old one under another name. No manager may run.

    Names whose row is authentic are kept; other vTPMs are called vtpm-UUID. Of a closed group all authentic rows are
    kept, as nobody can see its records; it is to be done again once the group is open.

    Raises:
        DeniedError, IntegrityError, TpmError: see `opened_installation`.

    """
    with opened_installation(layout, config) as opened:
        new = layout.catalogue.with_name(layout.catalogue.name + ".rebuilding")
        _put_back(layout, new)
        audit, _, problems = audit_catalogue(layout, config, opened)
        groups = [group_row(uuid, GroupSeal.unpack(record.blob)) for uuid, record in opened.store.groups().items()]
        kept = [row for row in audit.vtpms if _is_stored(opened, row)]
        made = _unnamed(opened, kept)
        _remove(new)
        attached = _still_attached(opened, audit, kept)
        key = catalogue_key(opened.secret.store_key, opened.store.uuid)
        with Catalogue.create(new, key, opened.store.uuid) as catalogue:
            for group in groups:
                catalogue.add_group(group)
            for rows, text in ((kept, ", its name kept"), (made, ", its name made from its UUID")):
                for start in range(0, len(rows), _AT_ONCE):
                    catalogue.add_vtpms(rows[start : start + _AT_ONCE], "rebuilt", text)
            for row in attached:
                catalogue.attach(row)
            text = f"{len(kept)} names and {len(attached)} attachments kept, {len(made)} names made; labels are lost"
            catalogue.log("rebuilt", None, text)
        place = place_of(layout, config)
        old = _put_in_place(layout, new) if isinstance(place, Path) else _load(place, new)
        lost = None if problems else len(audit.attachments) - len(attached)
        unclear = _unclear(opened, layout, audit, made)
        return Rebuilt(len(groups), len(kept), len(made), len(attached), lost, old, unclear)


def _still_attached(opened: Opened, audit: Audit, kept: list[VtpmRow]) -> list[AttachmentRow]:
    """Return the attachments that the store vouches for; those of catalogue schema 1 it does not know."""
    groups = {row.uuid: row.group for row in kept}
    found = []
    for row in audit.attachments:
        if groups.get(row.vtpm) in opened.closed:
            found.append(row)  # judged when the group is opened: an old one is never started
        elif row.vtpm in groups:
            with suppress(StoreError):  # its sector is damaged: then nothing vouches for it
                if staleness(opened.store.get(row.vtpm), row) is None:
                    found.append(row)
    return found


def _load(place: str, new: Path) -> str | None:
    """Put the new catalogue into its database; the old one stays there under another name."""
    old = Catalogue.put_aside(place)
    Catalogue.load(place, new)
    _remove(new)
    return None if old is None else f"schema {old} of {shown(place)}"


def _is_stored(opened: Opened, row: VtpmRow) -> bool:
    """Tell whether the row's vTPM has a record in the row's group, or may have one in a damaged sector."""
    try:
        return opened.store.get(row.uuid).group == row.group
    except StoreDamaged:
        return True
    except GroupClosed:
        return row.group in opened.closed
    except NoSuchVtpm:
        return False


def _unnamed(opened: Opened, kept: list[VtpmRow]) -> list[VtpmRow]:
    named = {row.uuid for row in kept}
    return [
        VtpmRow(record.uuid, f"vtpm-{record.uuid}", record.group, "1.2" if record.flags & RecordFlags.TPM12 else "2.0")
        for record in opened.store.vtpms()
        if record.uuid not in named
    ]


def _put_in_place(layout: Layout, new: Path) -> str | None:
    """Move the old catalogue with its tails aside, then the new one in; in between there is none, so nothing starts."""
    there = [tail for tail in _TAILS if _part(layout.catalogue, tail).exists()]
    numbers = range(1, 1_000_000)
    old = next(old for old in (_aside(layout, n) for n in numbers) if not any(_part(old, t).exists() for t in _TAILS))
    # The database first: without its -wal it would be an older one that still opens. A -wal alone goes too: SQLite
    # would play it into the new database.
    for tail in there:
        _part(layout.catalogue, tail).rename(_part(old, tail))
    sync_directory(layout.state_dir)
    new.rename(layout.catalogue)
    sync_directory(layout.state_dir)
    return str(old) if "" in there else None


def _put_back(layout: Layout, new: Path) -> None:
    """Undo the move of a rebuild that was cut short, so that this one finds the old catalogue where it was."""
    if layout.catalogue.exists() or not new.exists() or not _aside(layout, 1).exists():
        return
    old = _aside(layout, next(n for n in range(1, 1_000_000) if not _aside(layout, n + 1).exists()))
    for tail in reversed(_TAILS):  # the database last: until then this goes on from where it was
        if _part(old, tail).exists():
            _part(old, tail).rename(_part(layout.catalogue, tail))
    sync_directory(layout.state_dir)


def _aside(layout: Layout, number: int) -> Path:
    return layout.catalogue.with_name(f"{layout.catalogue.name}.old-{number}")


def _part(path: Path, tail: str) -> Path:
    return path.with_name(path.name + tail)


def _remove(path: Path) -> None:
    for tail in _TAILS:
        _part(path, tail).unlink(missing_ok=True)


def _unclear(opened: Opened, layout: Layout, audit: Audit, made: list[VtpmRow]) -> list[str]:
    said = [f"{damage.where}: {damage.problem}; the vTPMs in it have no name now" for damage in opened.store.damage]
    said += [str(tampered) for tampered in audit.tampered]
    for group, reason in opened.closed.items():
        name = GroupSeal.unpack(opened.store.groups()[group].blob).name
        said.append(
            f"group {name} is closed, so vTPMs of it without a name were not found: do it again later. {reason}"
        )
    for row in made:
        fresh = opened.store.get(row.uuid).flags & RecordFlags.FRESH
        if not fresh and not (layout.state_images / f"{row.uuid}.img").exists():
            said.append(f"vTPM {row.uuid}: its state image is not in {layout.state_images}: put it there")
    return said

"""`vtpm-manager rebuild-catalogue`: a catalogue out of what the store knows, beside what of the old one is authentic.

Who a vTPM runs for is not in the store, and an attachment from a catalogue that is in doubt is not believed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from manager.config import Config, Layout
from manager.durable import sync_directory
from manager.errors import DeniedError
from manager.keys import GroupSeal, catalogue_key
from manager.offline import audit_catalogue, opened_installation
from manager.opening import Opened
from storage.catalogue import Catalogue
from storage.catalogue_rows import Audit, GroupRow, VtpmRow
from storage.errors import NoSuchVtpm, StoreDamaged
from storage.store_records import RecordFlags

_TAILS: Final = ("", "-wal", "-shm", "-journal")
_AT_ONCE: Final = 5000  # rows in one transaction


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What became of the catalogue; `attachments_lost` is None where the old one could not be read.

    `old` is where the old one is kept; `unclear` are sentences about what an administrator should look at.
    """

    groups: int
    names_kept: int
    names_made: int
    attachments_lost: int | None
    old: str | None
    unclear: list[str]


def rebuild_catalogue(layout: Layout, config: Config) -> Rebuilt:
    """Make the catalogue anew and keep the old one under another name. No manager may run.

    Names whose row is authentic are kept; other vTPMs are called vtpm-UUID.

    Raises:
        DeniedError: a group is closed, so its vTPMs are not known. Others: see `opened_installation`.

    """
    with opened_installation(layout, config) as opened:
        if opened.closed:
            raise DeniedError(f"not rebuilt: {'; '.join(opened.closed.values())}. Nothing was changed")
        audit, _, problems = audit_catalogue(layout, opened)
        groups = [GroupRow(uuid, GroupSeal.unpack(record.blob).name) for uuid, record in opened.store.groups().items()]
        kept = [row for row in audit.vtpms if _is_stored(opened, row)]
        made = _unnamed(opened, kept)
        new = layout.catalogue.with_name(layout.catalogue.name + ".rebuilding")
        _remove(new)
        with Catalogue.create(new, catalogue_key(opened.secret.store_key, opened.store.uuid)) as catalogue:
            for group in groups:
                catalogue.add_group(group)
            for rows, text in ((kept, ", its name kept"), (made, ", its name made from its UUID")):
                for start in range(0, len(rows), _AT_ONCE):
                    catalogue.add_vtpms(rows[start : start + _AT_ONCE], "rebuilt", text)
            catalogue.log("rebuilt", None, f"{len(kept)} names kept, {len(made)} made; attachments are lost")
        old = _put_in_place(layout, new)
        attachments = None if problems else len(audit.attachments)
        return Rebuilt(len(groups), len(kept), len(made), attachments, old, _unclear(opened, layout, audit, made))


def _is_stored(opened: Opened, row: VtpmRow) -> bool:
    """Tell whether the row's vTPM has a record in the row's group, or may have one in a damaged sector."""
    try:
        return opened.store.get(row.uuid).group == row.group
    except StoreDamaged:
        return True
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
    old = None
    if layout.catalogue.exists():
        number = next(n for n in range(1, 1_000_000) if not _aside(layout, n).exists())
        old = _aside(layout, number)
        for tail in reversed(_TAILS):
            part = layout.catalogue.with_name(layout.catalogue.name + tail)
            if part.exists():
                part.rename(old.with_name(old.name + tail))
    sync_directory(layout.state_dir)
    new.rename(layout.catalogue)
    sync_directory(layout.state_dir)
    return None if old is None else str(old)


def _aside(layout: Layout, number: int) -> Path:
    return layout.catalogue.with_name(f"{layout.catalogue.name}.old-{number}")


def _remove(path: Path) -> None:
    for tail in _TAILS:
        path.with_name(path.name + tail).unlink(missing_ok=True)


def _unclear(opened: Opened, layout: Layout, audit: Audit, made: list[VtpmRow]) -> list[str]:
    said = [f"{damage.where}: {damage.problem}; the vTPMs in it have no name now" for damage in opened.store.damage]
    said += [str(tampered) for tampered in audit.tampered]
    for row in made:
        fresh = opened.store.get(row.uuid).flags & RecordFlags.FRESH
        if not fresh and not (layout.state_images / f"{row.uuid}.img").exists():
            said.append(f"vTPM {row.uuid}: its state image is not in {layout.state_images}: put it there")
    return said

"""What Xen itself says about a domain: its label, whether it ran before it got its vTPM, whether it was resumed.

`resumed` keeps the PCRs of the guest before, so a guest must not be able to look so. Three things are wanted at once:

1. the new domain never ran, and its processor is that of a saved guest (xen_vcpu): no guest's word, Xen's;
2. the domain that had the vTPM last ended suspended (its shutdown code). A guest can say so of itself, which is why
   1 is needed; the mark is used up by the next domain of that UUID, whatever that is;
3. both have one UUID. The manager asks for this too.

What is trusted: Xen, the toolstack, and the operator not to restore an older save than the last one: the vTPM then goes
on from where it was last, under the older guest. Outside dom0 Xen answers nobody: nothing is resumed there, and what
happened before is "not known".
"""

import json
import logging
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from frontend_backend.xen_hypercalls import DomainInfo, HypercallError, Hypervisor, XenReleaseError
from frontend_backend.xen_kernel import XenError
from frontend_backend.xen_terms import Place
from frontend_backend.xen_vcpu import was_restored
from manager.xen_backend import Testimony, Witness
from manager.xen_backend_identity import Identity

_log = logging.getLogger("vtpm.xen")
_SUSPENDED: Final = 2  # SHUTDOWN_suspend (sched.h)
EARLY_SECONDS: Final = 30.0
"""Seconds after which a guest that runs without its vTPM is late: it is asked for at once, and asked for again where a
manager is just starting; who runs for longer may have been changed by others before its PCRs begin."""
_MOST_NOTES: Final = 4096  # files of suspended domains that were never resumed; the oldest go first


@dataclass(frozen=True, slots=True)
class Met:
    """What was seen of a domain as its device appeared, while the toolstack held it. `uuid` is Xen's handle.

    `since`: when that was, in seconds since our kernel's boot; `served`: the device has had a vTPM.
    """

    uuid: str
    ran_before: bool | None
    restored: bool
    since: float = 0.0
    served: bool = False

    def late(self, *, has_run: bool) -> bool | None:
        """Tell whether a vTPM that comes now comes to a guest with a past, of which `has_run` is the present life."""
        waited = time.clock_gettime(time.CLOCK_BOOTTIME) - self.since > EARLY_SECONDS
        return True if has_run and (self.served or waited) else self.ran_before


class NoWitness:
    """Where the hypervisor may not be asked: outside dom0."""

    def meet(self, place: Place) -> None:
        """See Witness."""

    def testify(self, _place: Place, _identity: Identity) -> Testimony:
        """See Witness."""
        return Testimony()

    def bound(self, place: Place) -> None:
        """See Witness."""

    def part(self, place: Place) -> None:
        """See Witness."""


class XenWitness:
    """The hypervisor's answers. What cannot be asked again is kept in files, for the next vtpm-xen."""

    def __init__(self, xen: Hypervisor, directory: Path) -> None:
        """Keep notes in `directory`, which is ours alone and is emptied at boot, as domains are."""
        self._xen, self._directory = xen, directory

    def _note(self, place: Place) -> Path:
        return self._directory / f"{place.domain}-{place.device}.met"

    def _suspended(self, uuid: str) -> Path:
        return self._directory / f"{uuid}.suspended"

    def _info(self, place: Place) -> DomainInfo | None:
        try:
            return self._xen.info(place.domain)
        except XenError as error:
            _log.warning("%s: %s", place, error)
            return None

    def meet(self, place: Place) -> None:
        """See Witness."""
        info = self._info(place)
        if info is None:
            return
        before = self._read(place)
        if before is not None and before.uuid == info.uuid:
            return  # the vtpm-xen before us met it
        try:
            restored = was_restored(self._xen, info)
        except XenError as error:
            _log.warning("%s: whether it was restored is not known: %s", place, error)
            restored = None
        past = info.has_run or restored  # a restored guest's kernel ran in another life
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._write(self._note(place), json.dumps(asdict(Met(info.uuid, past, restored is True, now))))

    def testify(self, place: Place, identity: Identity) -> Testimony:
        """See Witness."""
        info, met = self._info(place), self._read(place)
        if info is None:
            return Testimony()
        label = self._label(info)
        if met is None or met.uuid != info.uuid:
            return Testimony(label, info.has_run or None)
        late = met.late(has_run=info.has_run)
        if identity.uuid and identity.uuid != info.uuid:
            _log.error("%s: xenstore calls it %s, Xen %s: not taken for resumed", place, identity.uuid, info.uuid)
            return Testimony(label, late)
        return Testimony(label, late, met.restored and self._suspended(met.uuid).exists())

    def _label(self, info: DomainInfo) -> str:
        try:
            return self._xen.label(info.ssidref)
        except HypercallError as error:
            _log.warning("domain %d: its label is not known: %s", info.domain, error)
            return ""

    def bound(self, place: Place) -> None:
        """See Witness."""
        met = self._read(place)
        if met is not None:
            self._suspended(met.uuid).unlink(missing_ok=True)
            if not met.served:
                self._write(self._note(place), json.dumps(asdict(replace(met, served=True))))

    def part(self, place: Place) -> None:
        """See Witness."""
        info = self._info(place)
        if info is not None and info.shutdown_code == _SUSPENDED:
            self._make_room()
            self._write(self._suspended(info.uuid), "")
            _log.info("%s: saved; its vTPM waits for it to be restored", place)
        self._note(place).unlink(missing_ok=True)

    def _make_room(self) -> None:
        notes = sorted(self._directory.glob("*.suspended"), key=lambda note: note.stat().st_mtime)
        for note in notes[: max(0, len(notes) - _MOST_NOTES + 1)]:
            note.unlink(missing_ok=True)

    def _read(self, place: Place) -> Met | None:
        try:
            return Met(**json.loads(self._note(place).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            _log.error("%s cannot be read (%s): what was seen of the domain is not known", self._note(place), error)
            return None

    def _write(self, path: Path, text: str) -> None:
        """Whole or not at all, whenever we are killed. What cannot be kept is not known then; no guest waits for it."""
        new = path.with_name(f".{path.name}")
        try:
            with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "w") as file:
                file.write(text)
            new.replace(path)
        except OSError as error:
            _log.error("%s cannot be written (%s): what it says of the domain is not known", path, error.strerror)
            path.unlink(missing_ok=True)


def open_witness(directory: Path) -> Witness:
    """Return who can say it here."""
    try:
        xen = Hypervisor.open_if_allowed()
    except XenReleaseError as error:
        _log.warning("%s", error)
        xen = None
    if xen is None:
        _log.info("Xen is not to be asked about domains here: labels and earlier lives of guests are not known")
        return NoWitness()
    return XenWitness(xen, directory)

"""What guests' boots are measured by: kept in attachments' rows as digests, told to instances as each boot begins.

Where the digests come from: measure_option. Of Xen guests attached with `--measure toolstack` they are those of what
libxl names, at each boot.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final
from uuid import UUID

from frontend_backend.errors import MessageError
from frontend_backend.measurements import PCR_OF, all_from_text
from manager.errors import ManagerError, UsageError
from manager.measure_option import TOOLSTACK
from manager.running import Running
from storage.catalogue_rows import AttachmentRow

_log = logging.getLogger("vtpm.life")
_BEFORE: Final = frozenset({None, "0.2.0"})
"""Releases whose instances refuse a Load that measures; those that do not tell their number are older still."""


def refuse_setting(measure: str, startup: str, frontend: str, hw_pcrs: str) -> None:
    """Refuse measurements that an attachment's boots cannot have. Raises UsageError."""
    if not measure:
        return
    # at each boot of a guest of Xen, which "state" begins with what the boot before left
    if startup in ("none", "deactivated") or (startup == "state" and frontend == "xen"):
        raise UsageError(
            f"a boot is measured right after a Startup(CLEAR) that the host does: not with --startup "
            f"{startup}. Nothing was done"
        )
    if measure == TOOLSTACK and frontend != "xen":
        raise UsageError(f"--measure {TOOLSTACK} is for guests of Xen: give files, or digests. Nothing was done")
    pcrs = {PCR_OF[one.what] for one in all_from_text(measure)} if measure != TOOLSTACK else set(PCR_OF.values())
    both = sorted(pcrs & {int(pcr) for pcr in hw_pcrs.split(",") if pcr})
    if both:
        raise UsageError(
            f"PCR {both[0]} cannot hold both the hardware's value (--hwinitpcrs) and the guest's boot (--measure): the "
            f"event log could not explain it. Nothing was done"
        )


class Boots:
    """Tells instances what a boot is measured by, and keeps in the attachment's row what they were told last."""

    def __init__(
        self,
        find: Callable[[UUID], AttachmentRow | None],
        renew: Callable[[AttachmentRow], None],
        release: Callable[[Running], str | None],
    ) -> None:
        """Keep rows by `find` and `renew` (storage.catalogue); `release` says whose code an instance runs."""
        self._find, self._renew, self._release = find, renew, release
        self._toolstack: dict[UUID, str] = {}

    def by_toolstack(self, vtpm: UUID, measured: str) -> None:
        """Measure the next boot of a guest by what `of_toolstack` found, if its attachment wants that."""
        self._toolstack[vtpm] = measured

    def begin(self, running: Running) -> tuple[bytes, ...]:
        """Return what an instance extends now; it is in the row before the instance is told.

        Raises:
            MessageError: the row cannot be understood. StorageError: it could not be kept; nothing is to be told then.

        """
        if running.measure and not running.elsewhere and self._release(running) in _BEFORE:
            _log.warning(
                "vTPM %s: its instance is of before an upgrade and cannot measure a boot: 'vtpm-reset-platform' starts "
                "one that can",
                running.vtpm,
            )
            return ()
        # by what the present boot was measured where no guest has booted since this manager began
        toolstack = self._toolstack.get(running.vtpm, running.measured)
        text = toolstack if running.measure == TOOLSTACK else running.measure
        told = tuple(measurement.pack() for measurement in all_from_text(text))
        if running.measured != text:
            attachment = self._find(running.vtpm)  # None while it is being attached: then the row comes later
            if attachment is not None:
                self._renew(replace(attachment, measured=text))
            running.measured = text
        return told

    def under_a_guest(self, attachment: AttachmentRow) -> AttachmentRow:
        """Note, before PCRs begin anew, that a guest of Xen has run that they begin under; returns its newest row.

        Raises:
            StorageError: it could not be kept; nothing is to be reset then.

        """
        newest = self._find(attachment.vtpm) or attachment
        if newest.ran_before is False:
            newest = replace(newest, ran_before=True)
            self._renew(newest)
        return newest

    def change(self, attachment: AttachmentRow, running: Running | None, measure: str) -> None:
        """Measure the next boots of an attached vTPM's guest so. Raises UsageError, StorageError."""
        refuse_setting(measure, attachment.startup, attachment.frontend, attachment.hw_pcrs)
        self._renew(replace(attachment, measure=measure))
        if running is not None:
            running.measure = measure


def shown(text: str) -> str | None:
    """Return what a row's text measures, in words for people: `kernel,cmdline`; None for nothing."""
    if text == TOOLSTACK:
        return text
    try:
        return ",".join(measurement.what for measurement in all_from_text(text)) or None
    except MessageError as error:
        raise ManagerError(f"an attachment's measurements cannot be read: {error}") from error

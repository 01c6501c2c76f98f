"""What an attachment's row says of its instance, in the words the instance or the sweep understands."""

from manager.config import InstanceConfig
from manager.errors import UsageError
from storage.catalogue_rows import AttachmentRow
from storage.store_records import RecordFlags

_NEVER = "never"
_EVERY_TIME = frozenset({"none", "deactivated"})
_FIRMWARE = frozenset({"qemu"})  # front ends whose guests have firmware that sends TPM2_Startup
_MOST_SECONDS = 10 * 365 * 86_400  # a number of 32 bits in the catalogue, and longer than any host stays up


def after_reset(attachment: AttachmentRow) -> str:
    """Return the startup after a platform reset: what the attachment asks for, but never an old state again."""
    return attachment.startup if attachment.startup in _EVERY_TIME else "clear"


def default_startup(frontend: str) -> str:
    """Return the startup of an attachment where nothing else was asked for."""
    return "none" if frontend in _FIRMWARE else "clear"


def next_startup(attachment: AttachmentRow, flags: RecordFlags) -> str:
    """Return what an instance is started with whose predecessor has ended; `flags` are its vTPM's record's.

    QEMU's connections ended with it, and the next QEMU switches the TPM on anew: it waits for that, switched off, so
    that nobody finds what the guest before had in its PCRs. Unless it was hibernated: then its QEMU is still there.
    """
    if flags & RecordFlags.FRESH:
        return attachment.startup
    if attachment.frontend in _FIRMWARE and not flags & RecordFlags.HIBERNATED:
        return "none"
    return "state" if flags & RecordFlags.RESUMABLE else "failed"


def rest_after(attachment: AttachmentRow, config: InstanceConfig) -> float:
    """Return after how many seconds without a command its vTPM is hibernated, 0 for never."""
    own = attachment.hibernate_after
    return max(config.hibernate_after, 0.0) if own is None else float(own)


def parse_rest(text: str | None) -> int | None:
    """Read --hibernate: None (as configured), "never" (0) or seconds.

    Raises:
        UsageError: it is neither.

    """
    if text is None:
        return None
    if text == _NEVER:
        return 0
    if not text.isascii() or not text.isdecimal() or not 0 < int(text[:12]) <= _MOST_SECONDS:
        raise UsageError(f"'{text[:40]}' is no time to hibernate after: write never, or whole seconds from 1")
    return int(text)

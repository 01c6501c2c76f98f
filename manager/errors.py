"""Errors of the manager, each with a command's exit code. They say what happened, what was kept, what to do."""

import os
from typing import ClassVar
from uuid import UUID

from frontend_backend.messages_admin import ExitCode


class ManagerError(Exception):
    """What was asked was not done."""

    code: ClassVar[ExitCode] = ExitCode.FAILURE


class UsageError(ManagerError):
    """The caller's fault: an argument cannot be what it says."""

    code = ExitCode.USAGE


class ConfigurationError(ManagerError):
    """The administrator's fault: a configuration file does not say what it must."""

    code = ExitCode.USAGE


class NotFoundError(ManagerError):
    """The caller's fault: no such vTPM, group or manager."""

    code = ExitCode.NOT_FOUND


class ConflictError(ManagerError):
    """The caller's fault: it exists already, or is in a state where this cannot be done."""

    code = ExitCode.CONFLICT


class DeniedError(ManagerError):
    """The caller's role, a closed group or the TPM's policy forbids it."""

    code = ExitCode.DENIED


class GroupClosedError(DeniedError):
    """The key of a group could not be had, so its vTPMs cannot be read or changed."""

    def __init__(self, name: str, reason: str | None) -> None:
        why = reason or "Its key was not given."
        super().__init__(
            f"group {name} is closed, so nothing of its vTPMs can be read or changed; all of it is kept. {why} "
            f"Once the cause is gone 'vtpm-group-open {name}' opens it, without a restart; if it stays, 'vtpm-manager "
            f"recover --group {name}' does, with the recovery key. Other groups are not concerned"
        )


class IntegrityError(ManagerError):
    """An image is not what the manager or the hardware TPM vouches for. Nothing was changed."""

    code = ExitCode.INTEGRITY


class RolledBackError(IntegrityError):
    """The store is older than the one the hardware TPM's anchors stand for."""


class QuarantinedError(IntegrityError):
    """A vTPM's state could not be loaded; it is kept as it is and does not start."""


class StaleAttachmentError(IntegrityError):
    """The catalogue holds a genuine, but old attachment: somebody put it back."""

    def __init__(self, vtpm: UUID, guest: str, problem: str) -> None:
        super().__init__(
            f"the catalogue's attachment of vTPM {vtpm} to guest {guest} is an old one that was put back: {problem}. "
            f"Nothing was started or changed. 'vtpm-detach {vtpm}' takes it out; where the manager does not start, put "
            f"the newest catalogue back, or run 'vtpm-manager rebuild-catalogue', which keeps what the store knows"
        )


class BusyError(ManagerError):
    """Not now: something else holds it, or an answer took too long."""

    code = ExitCode.BUSY


class KeeperError(ManagerError):
    """The keeper could not start or keep an instance."""


class KeeperRefusedError(KeeperError):
    """The keeper is there, and said no."""


class KeeperFullError(KeeperRefusedError):
    """The keeper is there, and has no descriptors left for this: another one may."""


def refused_by_system(error: OSError) -> ManagerError:
    """Return what to say where the operating system refused a file, with the exit code of it."""
    kind = {FileNotFoundError: NotFoundError, PermissionError: DeniedError}.get(type(error), ManagerError)
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return kind(f"{where}{error.strerror or error}")

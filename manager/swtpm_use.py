"""A manager's vTPM in use by the command in swtpm's place: found, held, let go.

One such command has a vTPM at a time: a lock in the folder of its sockets, which only its owner and root can write to.
"""

import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self
from uuid import UUID

from frontend_backend.messages_admin import ExitCode
from manager import swtpm_control
from manager.client import RemoteError, request
from manager.errors import BusyError, DeniedError, ManagerError, NotFoundError

_log = logging.getLogger("vtpm.swtpm")
_LOCK: Final = "swtpm.lock"


@dataclass(slots=True)
class Use:
    """A vTPM in use: its folder of sockets, the admin socket, whether we attached it, the lock.

    `switched`: whether it may have been switched on by us, or by somebody who came by here.
    """

    folder: Path
    admin: str
    ours: bool
    lock: int = -1
    switched: bool = False

    @classmethod
    def begin(cls, folder: Path, guest: str | None, admin: str) -> Self:
        """Take a vTPM into use, attaching it where that is needed and we may.

        Nothing is asked of the vTPM itself, which may have to wake first: libvirt gives us a second to listen.

        Raises:
            DeniedError: it was not given to us. BusyError: another command has it, or nobody serves it. ManagerError:
            it cannot be attached.

        """
        try:
            swtpm_control.connect(folder, swtpm_control.CONTROL).close()
            using = cls(folder, admin, ours=False)
        except NotFoundError as missing:
            _attach(folder.name, guest, admin, missing)
            using = cls(folder, admin, ours=True)
        try:
            using.lock = _locked(folder)
        except ManagerError:
            using.end()
            raise
        return using

    def end(self) -> None:
        """Switch it off, and detach it if we attached it. What fails is logged: the manager sees to the rest."""
        for wanted, act in ((self.switched, self._switch_off), (self.ours, self._detach)):
            try:
                if wanted:
                    act()
            except ManagerError as error:
                _log.error("vTPM %s was not let go cleanly: %s", self.folder.name, error)
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def _switch_off(self) -> None:
        swtpm_control.power_off(self.folder)

    def _detach(self) -> None:
        request(self.admin, "detach", {"vtpm": self.folder.name})


def _locked(folder: Path) -> int:
    path = folder / _LOCK
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DeniedError(
            f"vTPM {folder.name} was not given to this user: {path}: {error.strerror or error}"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise BusyError(f"vTPM {folder.name} is in use by another vtpm-swtpm; nothing was started") from None
    return lock


def folder_of(named: str, admin: str) -> Path:
    """Return the folder of a vTPM's sockets; a name is looked up, which takes a role. Raises ManagerError."""
    try:
        vtpm = UUID(named)
    except ValueError:
        try:
            vtpm = UUID(request(admin, "show", {"vtpm": named})[0]["uuid"])
        except DeniedError as error:
            raise DeniedError(f"{error}. A user without a role names a vTPM by its UUID, not by its name") from error
        except RemoteError as error:
            if error.exit_code is not ExitCode.DENIED:
                raise
            raise DeniedError(f"{error}. A user without a role names a vTPM by its UUID, not by its name") from error
    return Path(admin).parent / "vtpm" / str(vtpm)


def _attach(vtpm: str, guest: str | None, admin: str, missing: NotFoundError) -> None:
    """Attach a vTPM to ourselves. Raises ManagerError: we may not, or it cannot be."""
    arguments = {"vtpm": vtpm, "guest": guest or f"swtpm-{os.getpid()}", "frontend": "qemu", "mode": "0600"}
    try:
        request(admin, "attach", {**arguments, "owner": str(os.geteuid())})
    except RemoteError as error:
        if error.exit_code is not ExitCode.DENIED:
            raise
        raise _not_given(missing) from error
    except (DeniedError, NotFoundError) as error:
        raise _not_given(missing) from error


def _not_given(missing: NotFoundError) -> DeniedError:
    return DeniedError(
        f"{missing}, and this user is no operator, who could attach it. An operator gives it to him: 'vtpm-attach VTPM "
        f"GUEST --frontend qemu --owner {os.geteuid()}'"
    )

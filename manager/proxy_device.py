"""The Linux vTPM proxy: a /dev/tpmN of this host whose commands an instance answers.

What lives here: how the kernel is asked for such a device, and what it says of it. What must not: when (`ports`), and
what is said on the server's descriptor (vtpm_instance.proxy). Source: linux/vtpm_proxy.h, tpm_vtpm_proxy.c.
"""

import errno
import fcntl
import json
import os
import select
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from frontend_backend import vtpm_proxy
from frontend_backend.messages_admin import ExitCode
from frontend_backend.vtpm_proxy import FLAG_TPM2, IOC_NEW_DEV, NEW_DEVICE
from manager.errors import DeniedError, KeeperError, ManagerError

CONTROL: Final = Path(vtpm_proxy.CONTROL)
_CLASSES: Final = {"2.0": ("tpm", "tpmrm"), "1.2": ("tpm",)}  # of /sys/class: the kernel's resource manager is for 2.0


class ProxyMissingError(ManagerError):
    """This host has no vTPM proxy."""

    code = ExitCode.FAILURE

    def __init__(self) -> None:
        super().__init__(
            f"there is no {CONTROL}, so no /dev/tpmN can be made; nothing was attached. Load the kernel's module "
            f"(modprobe tpm_vtpm_proxy), and let the manager's unit use {CONTROL}: docs/containers.md"
        )


@dataclass(frozen=True, slots=True)
class ProxyDevice:
    """What the kernel calls a device that it made: /dev/tpm`number`, and its numbers for mknod(2) and cgroups."""

    number: int
    major: int
    minor: int
    family: str

    @property
    def path(self) -> Path:
        """The device that a program opens by default: without a resource manager."""
        return Path(f"/dev/tpm{self.number}")

    @property
    def paths(self) -> list[Path]:
        """Its device nodes, the resource manager's last."""
        return [Path(f"/dev/{name}{self.number}") for name in _CLASSES[self.family]]

    @property
    def registered(self) -> bool:
        """Whether the kernel's driver has made friends with the TPM, so that it can be opened."""
        return all(_numbers_of(name, self.number) is not None for name in _CLASSES[self.family])

    @property
    def manager_numbers(self) -> str | None:
        """Major and minor number of the resource manager's device, None where there is none."""
        return _numbers_of("tpmrm", self.number) if "tpmrm" in _CLASSES[self.family] else None

    def write(self, path: Path) -> None:
        """Write it down for the next manager: the kernel does not tell it again. Raises OSError."""
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(asdict(self)) + "\n", encoding="ascii")
        unfinished.chmod(0o644)
        unfinished.rename(path)

    @classmethod
    def read(cls, path: Path) -> "ProxyDevice | None":
        """Return what `write` wrote, None where nothing is."""
        try:
            found = json.loads(path.read_bytes())
            return cls(int(found["number"]), int(found["major"]), int(found["minor"]), str(found["family"]))
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ManagerError(f"{path} does not say which device this is ({error}); detach and attach it") from error


def _numbers_of(name: str, number: int) -> str | None:
    """Return MAJOR:MINOR of a device of class `name`."""
    try:
        return Path(f"/sys/class/{name}/{name}{number}/dev").read_text(encoding="ascii").strip()
    except OSError:
        return None


def new_device(family: str) -> tuple[ProxyDevice, int]:
    """Have the kernel make a device; returns it and the server's descriptor. It goes when that is closed everywhere.

    Raises:
        ProxyMissingError: this host has none. DeniedError: the manager may not. KeeperError: the kernel refuses.

    """
    request = bytearray(NEW_DEVICE.pack(FLAG_TPM2 if family == "2.0" else 0, 0, 0, 0, 0))
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProxyMissingError from None
    except OSError as error:
        raise _refused(error) from error
    try:
        fcntl.ioctl(control, IOC_NEW_DEV, request)
    except OSError as error:
        raise _refused(error) from error
    finally:
        os.close(control)
    _, number, descriptor, major, minor = NEW_DEVICE.unpack(request)
    os.set_inheritable(descriptor, False)  # the kernel makes it with O_RDWR alone
    return ProxyDevice(number, major, minor, family), descriptor


def _refused(error: OSError) -> ManagerError:
    if error.errno in (errno.EPERM, errno.EACCES):
        return DeniedError(
            f"{CONTROL} is not for this manager ({error.strerror}); nothing was attached. It needs CAP_SYS_ADMIN, and "
            f"its unit DeviceAllow={CONTROL} rw: docs/containers.md has the drop-in"
        )
    return KeeperError(f"the kernel makes no device through {CONTROL}: {error.strerror}; nothing was attached")


def given_up(descriptor: int) -> bool:
    """Tell whether the kernel has given a device up: it did not get on with its TPM, and answers nobody."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def give_to(device: ProxyDevice, uid: int, gid: int, mode: int) -> None:
    """Give the device nodes to a user, as far as there are any: without devtmpfs who wants one makes it."""
    for path in device.paths:
        with suppress(FileNotFoundError):
            os.chown(path, uid, gid, follow_symlinks=False)
            path.chmod(mode)

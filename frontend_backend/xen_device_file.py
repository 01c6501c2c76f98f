"""Xen's device files in Linux: how they are opened, and the numbers of their ioctls."""

import os

from frontend_backend.xen_kernel import XenDeniedError, XenMissingError


def ioc(kind: str, number: int, size: int) -> int:
    """Return an ioctl's number, `_IOC(_IOC_NONE, kind, number, size)`, which all of Xen's drivers use."""
    return size << 16 | ord(kind) << 8 | number


def open_device(path: str, module: str) -> int:
    """Open one of Xen's device files, close-on-exec and non-blocking.

    Raises:
        XenMissingError: there is none here; says which module to load.
        XenDeniedError: this process may not.

    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise XenDeniedError(f"{path}: this process may not use it; it needs to run as root") from error
    except OSError as error:
        raise XenMissingError(
            f"{path}: {error.strerror}. Load the kernel's module {module} (modprobe {module});"
            " on a machine without Xen it cannot be loaded"
        ) from error

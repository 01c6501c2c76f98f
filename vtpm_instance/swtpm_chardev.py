"""`chardev`: TPM commands come from a character device, or from the server's end of a /dev/tpmN of this host.

Source: swtpm's swtpm_chardev.c; linux/vtpm_proxy.h.
"""

import fcntl
import os
import stat

from frontend_backend.swtpm_options import SwtpmOptions
from frontend_backend.swtpm_suboptions import OptionError
from frontend_backend.vtpm_proxy import CONTROL, FLAG_TPM2, IOC_NEW_DEV, NEW_DEVICE
from vtpm_instance.server import Server
from vtpm_instance.swtpm_sockets import adopted_socket


def open_device(options: SwtpmOptions, server: Server) -> None:
    """Have `server` answer what comes from the device that the command line names. Raises OptionError."""
    if options.vtpm_proxy:
        descriptor = _new_device(tpm2=options.tpm2)
    elif options.device is not None:
        try:
            descriptor = os.open(options.device, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise OptionError(f"Cannot open {options.device}: {error.strerror}") from error
    else:
        assert options.descriptor is not None, "the parser asks for one of the three"
        descriptor = options.descriptor
    try:
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISSOCK(kind):
            server.take_data_socket(adopted_socket(descriptor))
            return
        if stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_ISBLK(kind):
            raise OptionError("Given file descriptor type is not supported.")
        os.set_inheritable(descriptor, False)
        server.add_proxy_port(descriptor)
    except OSError as error:
        raise OptionError(f"TPM commands cannot be taken from descriptor {descriptor}: {error.strerror}") from error


def _new_device(*, tpm2: bool) -> int:
    request = bytearray(NEW_DEVICE.pack(FLAG_TPM2 if tpm2 else 0, 0, 0, 0, 0))
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise OptionError(f"Could not open {CONTROL}: {error.strerror}") from error
    try:
        fcntl.ioctl(control, IOC_NEW_DEV, request)
    except OSError as error:
        raise OptionError(f"ioctl to create vtpm proxy failed: {error.strerror}") from error
    finally:
        os.close(control)
    _, number, descriptor, major, minor = NEW_DEVICE.unpack(request)
    line = f"New TPM device: /dev/tpm{number} (major/minor = {major}/{minor})\n"
    os.write(1, line.encode("ascii"))
    return int(descriptor)

#!/usr/bin/env python3
"""The command `vtpm-guest-device`: makes a whole TPM 2.0 device out of the raw one that a guest of Xen has.

Linux' xen-tpmfront takes every TPM for a 1.2, so a TPM 2.0 vTPM has /dev/tpm0 but no /dev/tpmrm0, and the kernel itself
cannot use it. This service opens that device and answers, with it, for one that the kernel's vTPM proxy makes: that one
is a TPM 2.0 (tpm_version_major 2), with a resource manager and for the kernel's own users. One command at a time.
Standard library only, one file, Python 3.7 or later: copy it into the guest. docs/xen-guests.md.
Source: linux/vtpm_proxy.h, drivers/char/tpm/tpm_vtpm_proxy.c, xen-tpmfront.c, tpm-dev-common.c.
"""

from __future__ import annotations  # Python 3.7 has no list[str] and no `X | None`

import argparse
import errno
import fcntl
import os
import select
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

EXIT_OK, EXIT_FAILURE, EXIT_USAGE, EXIT_NOT_FOUND, EXIT_DENIED = 0, 1, 2, 3, 5  # as every command of vtpm-manager

CONTROL = "/dev/vtpmx"
_NEW_DEVICE = struct.Struct("=IIIII")  # struct vtpm_proxy_new_dev: flags, tpm_num, fd, major, minor
_IOC_NEW_DEV = 3 << 30 | _NEW_DEVICE.size << 16 | 0xA1 << 8 | 0x00  # _IOWR(0xa1, 0x00, ...)
_FLAG_TPM2 = 1
_HEADER = struct.Struct(">HII")  # tag, size, code (TPM 2.0 Part 1, 18.2)
_NO_SESSIONS = 0x8001
_SET_LOCALITY = 0x20001000  # TPM2_CC_SET_LOCALITY: the proxy driver's own, never for the TPM
_GET_TEST_RESULT = 0x17C
_RC_FAILURE, _RC_LOCALITY = 0x101, 0x907
_BUFFER = 4096  # bytes; TPM_BUFSIZE, of both drivers
_REGISTERED_SECONDS = 60.0  # until the new device can be opened: the kernel talks to it before (2 s at the most, here)
_CHECK_SECONDS = 1.0  # how often the raw device is looked at while nothing happens
_GONE = frozenset({errno.ENODEV, errno.EPIPE, errno.ENXIO, errno.EBADF, errno.ESHUTDOWN})


class GuestDeviceError(Exception):
    """It cannot go on; the text says what happened, what was kept, what to do."""

    def __init__(self, text: str, code: int = EXIT_FAILURE) -> None:
        super().__init__(text)
        self.code = code


def find_raw() -> str:
    """Return the device that xen-tpmfront has made.

    Raises:
        GuestDeviceError: there is none, or more than one.

    """
    found = []
    for entry in sorted(Path("/sys/class/tpm").glob("tpm*")):
        driver = os.path.realpath(str(entry / "device" / "driver"))
        if os.path.basename(driver) == "vtpm":
            found.append("/dev/" + entry.name)
    if len(found) != 1:
        what = " and ".join(found) or "none"
        raise GuestDeviceError(
            f"this guest has {what} of xen-tpmfront's devices, where one is wanted; nothing was done. Load the module "
            "(modprobe xen-tpmfront), look with 'xl vtpm-list' on the host, or name the device with --device",
            EXIT_NOT_FOUND,
        )
    return found[0]


def open_raw(path: str) -> int:
    """Open the raw device; the kernel lets one program have it at a time.

    Raises:
        GuestDeviceError: it is not there, used by another program, or not for us.

    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise GuestDeviceError(f"there is no {path}; nothing was done", EXIT_NOT_FOUND) from None
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise GuestDeviceError(
                f"{path} is used by another program (fuser -v {path} tells which): end it first, and have it use the "
                "new device from now on. Nothing was done"
            ) from None
        code = EXIT_DENIED if error.errno in (errno.EACCES, errno.EPERM) else EXIT_FAILURE
        raise GuestDeviceError(f"{path} cannot be opened: {error.strerror}; nothing was done", code) from None


def transmit(raw: int, command: bytes) -> bytes:
    """Have the vTPM execute a command. Raises OSError: the device is gone, or the kernel gave the command up."""
    os.write(raw, command)
    return os.read(raw, _BUFFER)


def refuse_other_tpms(raw: int, path: str) -> None:
    """Check that it is a TPM 2.0. Raises GuestDeviceError: it is a TPM 1.2, or does not answer."""
    try:
        answer = transmit(raw, _HEADER.pack(_NO_SESSIONS, _HEADER.size, _GET_TEST_RESULT))
    except OSError as error:
        raise GuestDeviceError(f"{path} does not answer: {error.strerror}; nothing was done") from error
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[0] != _NO_SESSIONS:
        raise GuestDeviceError(
            f"{path} is no TPM 2.0: a TPM 1.2 needs no help, use it as it is. Nothing was done", EXIT_USAGE
        )


def new_device() -> tuple[int, int]:
    """Have the proxy make a TPM 2.0 device; returns its number and our end. It goes when that is closed.

    Raises:
        GuestDeviceError: the kernel has no proxy, or it is not for us.

    """
    request = bytearray(_NEW_DEVICE.pack(_FLAG_TPM2, 0, 0, 0, 0))
    try:
        control = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise GuestDeviceError(
            f"there is no {CONTROL}: load the module first (modprobe tpm_vtpm_proxy). Nothing was done",
            EXIT_NOT_FOUND,
        ) from None
    except OSError as error:
        raise GuestDeviceError(f"{CONTROL}: {error.strerror}; nothing was done", EXIT_DENIED) from None
    try:
        fcntl.ioctl(control, _IOC_NEW_DEV, request)
    except OSError as error:
        code = EXIT_DENIED if error.errno == errno.EPERM else EXIT_FAILURE
        raise GuestDeviceError(f"{CONTROL} makes no device: {error.strerror}; nothing was done", code) from None
    finally:
        os.close(control)
    _, number, descriptor, _, _ = _NEW_DEVICE.unpack(request)
    os.set_inheritable(descriptor, False)
    return number, descriptor


def answer_here(command: bytes) -> bytes | None:
    """Return the answer to what is not for the vTPM, None for everything else.

    The proxy's driver sets a locality before every command; xen-tpmfront has locality 0 alone.
    """
    if len(command) < _HEADER.size:
        return _HEADER.pack(_NO_SESSIONS, _HEADER.size, _RC_FAILURE)
    if _HEADER.unpack_from(command)[2] != _SET_LOCALITY:
        return None
    allowed = command[_HEADER.size :] == b"\0"
    return _HEADER.pack(_NO_SESSIONS, _HEADER.size, 0 if allowed else _RC_LOCALITY)


class Relay:
    """Between our end of the new device and the raw one."""

    def __init__(self, raw: int, ours: int, path: str) -> None:
        """Relay between `ours` and `raw`, whose name is `path`."""
        self._raw, self._ours, self._path = raw, ours, path

    def one(self) -> None:
        """Relay one command and its answer.

        Raises:
            GuestDeviceError: the raw device is gone. EOFError: the kernel gave the new device up.

        """
        try:
            command = os.read(self._ours, _BUFFER)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise EOFError from error
            if error.errno in (errno.EINTR, errno.EIO):
                return
            raise
        answer = answer_here(command)
        try:
            answer = transmit(self._raw, command) if answer is None else answer
        except OSError as error:
            self._answer(_HEADER.pack(_NO_SESSIONS, _HEADER.size, _RC_FAILURE))
            if error.errno in _GONE:
                raise self.unplugged() from error
            say(f"a command was given up by the kernel ({error.strerror}), and answered TPM_RC_FAILURE")
            return
        self._answer(answer or _HEADER.pack(_NO_SESSIONS, _HEADER.size, _RC_FAILURE))

    def _answer(self, answer: bytes) -> None:
        try:
            os.write(self._ours, answer)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):  # nobody waits for it any more
                raise

    def unplugged(self) -> GuestDeviceError:
        """Return what is said when the raw device is gone."""
        return GuestDeviceError(
            f"{self._path} is gone: the host took the vTPM away, or this guest was moved. The device made of it goes, "
            "too; this service makes another once the raw one is back (systemd starts it again)"
        )

    def still_there(self) -> bool:
        """Tell whether the raw device is."""
        poll = select.poll()
        poll.register(self._raw, 0)
        gone = any(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))
        return not gone and os.path.exists("/sys/class/tpm/" + os.path.basename(os.path.realpath(self._path)))

    def run(self, wakeup: int, ready: Ready) -> None:
        """Relay until SIGTERM. Raises GuestDeviceError: a device is gone."""
        poll = select.poll()
        poll.register(self._ours, select.POLLIN)
        poll.register(wakeup, select.POLLIN)
        while True:
            happened = dict(poll.poll(int(1000 * (ready.pause if ready.waits else _CHECK_SECONDS))))
            if wakeup in happened:
                return
            if happened.get(self._ours, 0) & select.POLLIN:
                try:
                    self.one()
                except EOFError:
                    raise ready.given_up() from None
            elif self._ours in happened:
                raise ready.given_up()
            if ready.waits:
                ready.look()
            elif not happened and not self.still_there():
                raise self.unplugged()


def _class(name: str) -> str:
    """Return where sysfs has a device: tpm0 is in the class tpm, tpmrm0 in tpmrm."""
    return f"/sys/class/{name.rstrip('0123456789')}/{name}"


class Ready:
    """Waits for the device nodes, then links the stable name, tells systemd, and says so."""

    pause = 0.05  # seconds between two looks

    def __init__(self, number: int, link: str, raw: str) -> None:
        """Wait for device `number`; `link` (empty: none) is to lead to its resource manager."""
        self._nodes = [f"/dev/tpm{number}", f"/dev/tpmrm{number}"]
        self._link, self._raw = link, raw
        self._limit = time.monotonic() + _REGISTERED_SECONDS
        self.waits = True

    def look(self) -> None:
        """Look whether they are there. Raises GuestDeviceError: not in time."""
        names = [os.path.basename(node) for node in self._nodes]
        if all(os.path.exists(_class(name)) for name in names):
            self.waits = False
            self._make_nodes(names)
            if self._link:
                link_to(self._link, self._nodes[1])
            linked = f", as {self._link}," if self._link else ""
            say(f"{self._nodes[0]} and {self._nodes[1]}{linked} are a TPM 2.0, of {self._raw}")
            notify(f"READY=1\nSTATUS={self._nodes[1]} of {self._raw}")
        elif time.monotonic() > self._limit:
            raise GuestDeviceError(f"the kernel did not get on with the TPM within {_REGISTERED_SECONDS:g} s")

    def _make_nodes(self, names: list[str]) -> None:
        """Make device nodes where devtmpfs has not (an initramfs without it)."""
        for name, node in zip(names, self._nodes):  # noqa: B905 - Python 3.7 has no strict=
            if os.path.exists(node):
                continue
            text = Path(_class(name), "dev").read_text(encoding="ascii")
            major, minor = map(int, text.split(":"))
            os.mknod(node, 0o600 | 0o020000, os.makedev(major, minor))

    def given_up(self) -> GuestDeviceError:
        """Return what is said when the kernel gave the new device up."""
        return GuestDeviceError(
            f"the kernel gave {self._nodes[0]} up: it did not get on with the vTPM (see dmesg), or its module went"
        )

    def unlink(self) -> None:
        """Take the stable name away if it is still ours."""
        if self._link and os.path.islink(self._link) and os.readlink(self._link) == self._nodes[1]:
            os.unlink(self._link)


def link_to(link: str, node: str) -> None:
    """Let `link` lead to `node`, in one step.

    Raises:
        GuestDeviceError: something that is no link is there.

    """
    if os.path.lexists(link) and not os.path.islink(link):
        raise GuestDeviceError(f"{link} is there and is no link; it was left alone. Name another with --link")
    unfinished = link + ".new"
    if os.path.lexists(unfinished):
        os.unlink(unfinished)
    os.symlink(node, unfinished)
    os.replace(unfinished, link)


def say(text: str) -> None:
    """Print a sentence where systemd's journal and people find it."""
    sys.stderr.write(f"vtpm-guest-device: {text}\n")
    sys.stderr.flush()


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)), where it started us."""
    import socket  # noqa: PLC0415 - only where systemd is

    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def load_module() -> None:
    """Have the proxy's module loaded, where that is possible: otherwise opening /dev/vtpmx says what is missing."""
    if not os.path.exists(CONTROL):
        try:
            subprocess.run(["modprobe", "tpm_vtpm_proxy"], check=False)
        except OSError:
            return  # no modprobe: what is missing is said by `new_device`


def serve(options: argparse.Namespace) -> int:
    """Make the device and relay until SIGTERM. Raises GuestDeviceError."""
    wakeup, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    path = options.device or find_raw()
    raw = open_raw(path)
    try:
        refuse_other_tpms(raw, path)
        load_module()
        index, ours = new_device()
        ready = Ready(index, options.link, path)
        try:
            Relay(raw, ours, path).run(wakeup, ready)
        finally:
            notify("STOPPING=1")
            ready.unlink()
            os.close(ours)  # the kernel takes the device away, and lets go who uses it
    finally:
        os.close(raw)
    say(f"ended; {path} is free again")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtpm-guest-device",
        description="In a guest of Xen: make a whole TPM 2.0 device (/dev/tpmrmN) out of xen-tpmfront's raw one.",
        epilog="exit codes: 0 ended by SIGTERM, 1 failure, 2 usage, 3 no such device, 5 denied",
    )
    parser.add_argument("--device", metavar="PATH", help="the raw device (default: xen-tpmfront's)")
    parser.add_argument(
        "--link", metavar="PATH", default="/dev/vtpmrm", help="name that leads to the new device ('' for none)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run `vtpm-guest-device`. Returns the exit code; argparse itself exits with 2 for wrong usage."""
    try:
        return serve(_parser().parse_args(argv))
    except GuestDeviceError as error:
        say(str(error))
        return error.code


if __name__ == "__main__":
    sys.exit(main())

"""`vtpm-swtpm ... --manager`: swtpm's command line for a manager's vTPM, in place of state files.

Who may use which vTPM is decided by nothing new: the sockets of an attachment are its owner's (`vtpm-attach
--frontend qemu --owner USER`), and this command connects to them as the user it runs as. It asks the manager for
nothing, except where its user is an operator anyway: then it attaches a vTPM that is not, and detaches it at the end.
"""

import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from frontend_backend.command_line import occupy_standard_descriptors
from frontend_backend.messages_admin import ExitCode
from frontend_backend.swtpm_options import Interface, SwtpmOptions, parse
from frontend_backend.swtpm_suboptions import OptionError
from manager import swtpm_control, swtpm_process
from manager.client import RemoteError, socket_path
from manager.errors import ManagerError, UsageError
from manager.swtpm_process import Ready
from manager.swtpm_session import Session
from manager.swtpm_use import Use, folder_of

VTPM_VARIABLE: Final = "VTPM_SWTPM_VTPM"
_WITHOUT_MANAGER: Final = "vtpm-swtpm"
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)


def wanted(options: SwtpmOptions, environment: Mapping[str, str]) -> str:
    """Return the UUID or name of the vTPM that a command line means.

    That is --vtpm, or VTPM_SWTPM_VTPM; with --manager-ignore-tpmstate at last the UUID in the state's path, as libvirt
    makes one of its domain's. A name only: who may use it is another matter.

    Raises:
        UsageError: it means none.

    """
    assert options.manager is not None
    named = options.manager.vtpm or environment.get(VTPM_VARIABLE)
    if named:
        return named
    if options.manager.ignore_tpmstate and options.state is not None:
        found = [part for part in Path(options.state.path).parts if _UUID.fullmatch(part)]
        if found:
            return found[-1].lower()
    raise UsageError(f"--manager needs --vtpm VTPM, or {VTPM_VARIABLE}: which vTPM of the manager's is it to be?")


def _refuse(options: SwtpmOptions) -> None:
    """Refuse what a managed vTPM does not have. Raises UsageError."""
    refusals = {
        "chardev: 'vtpm-attach VTPM GUEST --frontend proxy' makes a device": options.interface is Interface.CHARDEV,
        "--locality allow-set-locality": options.allow_set_locality,
        "--pcap: what a guest says to its TPM is not written down": options.pcap is not None,
        "--flags startup-deactivated": options.flags.startup == "deactivated" and options.tpm2,
        "--server ...,disconnect and -p: say --server type=tcp,port=N": bool(
            options.server and options.server.disconnect
        ),
    }
    for what, given in refusals.items():
        if given:
            raise UsageError(f"this does not go with --manager: {what}")
    if options.control is None and options.server is None:
        raise UsageError("neither --ctrl nor --server is there: nobody could use the vTPM")


def run(options: SwtpmOptions, ready: Ready) -> None:
    """Serve as the command line says until the end, which may be SIGTERM; `ready` is told when clients may come.

    Raises:
        ManagerError: it cannot be served; nothing is left behind.

    """
    _refuse(options)
    assert options.manager is not None
    admin = socket_path(options.manager.socket)
    using = Use.begin(folder_of(wanted(options, os.environ), admin), options.manager.guest, admin)
    wakeup, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.signal(signal.SIGINT, lambda _number, _frame: None)
    signal.set_wakeup_fd(wake.fileno())
    try:
        session = Session(options, using, wakeup)  # it listens now; who comes waits until it runs
        try:
            _start(options, using)
            swtpm_process.write_pid(options.pid)
            ready.say()
            session.run()
        finally:
            session.close()
    finally:
        using.end()
        signal.set_wakeup_fd(-1)
        wakeup.close()
        wake.close()


def _start(options: SwtpmOptions, using: Use) -> None:
    """Check that it is the vTPM that was meant, and switch it on where that is said. Raises ManagerError."""
    family = swtpm_control.check(using.folder, tpm2=options.tpm2)
    if options.flags.need_init:
        return
    using.switched = True
    swtpm_control.power_on(using.folder)
    if options.flags.startup not in (None, "none"):
        swtpm_control.start_up(using.folder, family, str(options.flags.startup))


def _parsed(words: Sequence[str]) -> SwtpmOptions:
    if not words or words[0] not in tuple(Interface):
        raise OptionError(f"begin with one of: {', '.join(Interface)}")
    return parse(Interface(words[0]), words[1:], os.environ)


def _print_without_manager(options: SwtpmOptions) -> None:
    """Let the other command print what libtpms can: no vTPM is needed for that."""
    words = ["--tpm2"] if options.tpm2 else []
    words += ["--print-capabilities"] if options.print_capabilities else []
    words += ["--print-profiles"] if options.print_profiles else []
    words += ["--print-info", str(options.print_info)] if options.print_info else []
    program = Path(sys.argv[0]).resolve().parent / _WITHOUT_MANAGER
    os.execv(program, [_WITHOUT_MANAGER, options.interface.value, *words])  # noqa: S606 - no shell is wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vtpm-swtpm-managed INTERFACE OPTIONS`; returns the exit code."""
    occupy_standard_descriptors()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        options = _parsed(sys.argv[1:] if argv is None else argv)
        if options.manager is None:
            raise OptionError("--manager is missing")
        if options.print_capabilities or options.print_profiles or options.print_info:
            _print_without_manager(options)
        if options.print_states:  # with --manager-ignore-tpmstate: what is ignored holds no states
            sys.stdout.write('{ "type": "swtpm", "states": [] }\n')
            return int(ExitCode.OK)
    except OptionError as error:
        sys.stderr.write(f"{error}\n")
        return int(ExitCode.USAGE)
    ready = Ready(daemon=options.daemon)
    try:
        swtpm_process.become(options.run_as)
        swtpm_process.log_to(options.log)
        run(options, ready)
    except ManagerError as error:
        ready.complain(f"vtpm-swtpm: {error}")
        return int(error.exit_code if isinstance(error, RemoteError) else error.code)
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())

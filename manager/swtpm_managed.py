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
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from frontend_backend.messages_admin import ExitCode
from frontend_backend.swtpm_options import Interface, SwtpmOptions, parse
from frontend_backend.swtpm_suboptions import OptionError
from manager import swtpm_control, swtpm_endpoints, swtpm_process
from manager.client import RemoteError, request, socket_path
from manager.errors import DeniedError, ManagerError, NotFoundError, UsageError
from manager.swtpm_process import Ready
from manager.swtpm_relay import Channel, Endings, Relay

_log = logging.getLogger("vtpm.swtpm")
VTPM_VARIABLE: Final = "VTPM_SWTPM_VTPM"
_WITHOUT_MANAGER: Final = "vtpm-swtpm"
_UUID: Final = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_NAMES: Final = {Channel.CONTROL: swtpm_control.CONTROL, Channel.DATA: swtpm_control.DATA}


@dataclass(frozen=True, slots=True)
class _Managed:
    """A vTPM in use: its folder of sockets, its family, and whether we attached it."""

    folder: Path
    family: str
    admin: str
    ours: bool

    def let_go(self) -> None:
        """Switch it off, and detach it if we attached it. What fails is logged: the manager sees to the rest."""
        try:
            swtpm_control.power_off(self.folder)
            if self.ours:
                request(self.admin, "detach", {"vtpm": self.folder.name})
        except ManagerError as error:
            _log.error("vTPM %s was not let go cleanly: %s", self.folder.name, error)


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


def _folder(named: str, admin: str) -> Path:
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


def _use(options: SwtpmOptions, environment: Mapping[str, str]) -> _Managed:
    """Find the vTPM, attaching it where that is needed and we may; raises ManagerError."""
    assert options.manager is not None
    admin = socket_path(options.manager.socket)
    folder = _folder(wanted(options, environment), admin)
    try:
        return _Managed(folder, swtpm_control.check(folder, tpm2=options.tpm2), admin, ours=False)
    except NotFoundError as missing:
        ours = _attach(folder.name, options.manager.guest, admin, missing)
    managed = _Managed(folder, "2.0" if options.tpm2 else "1.2", admin, ours)
    try:
        swtpm_control.check(folder, tpm2=options.tpm2)
    except ManagerError:
        managed.let_go()
        raise
    return managed


def _attach(vtpm: str, guest: str | None, admin: str, missing: NotFoundError) -> bool:
    """Attach a vTPM to ourselves; returns True. Raises ManagerError: we may not, or it cannot be."""
    arguments = {"vtpm": vtpm, "guest": guest or f"swtpm-{os.getpid()}", "frontend": "qemu", "mode": "0600"}
    try:
        request(admin, "attach", {**arguments, "owner": str(os.geteuid())})
    except RemoteError as error:
        if error.exit_code is not ExitCode.DENIED:
            raise
        raise _not_given(missing) from error
    except (DeniedError, NotFoundError) as error:
        raise _not_given(missing) from error
    return True


def _not_given(missing: NotFoundError) -> DeniedError:
    return DeniedError(
        f"{missing}, and this user is no operator, who could attach it. An operator gives it to him: 'vtpm-attach VTPM "
        f"GUEST --frontend qemu --owner {os.geteuid()}'"
    )


class _Session:
    """The relay of one command line, and what is there for it."""

    def __init__(self, options: SwtpmOptions, managed: _Managed, wakeup: socket.socket) -> None:
        """Open what the command line says. Raises ManagerError."""
        ends = Endings(
            with_control=options.control is not None and options.control.terminate, with_platform=options.terminate
        )
        self._options = options
        self._relay = Relay(lambda channel: _connection(managed.folder, channel), ends, wakeup)
        for channel, endpoint in ((Channel.CONTROL, options.control), (Channel.DATA, options.server)):
            if endpoint is None:
                continue
            client = swtpm_endpoints.connected(endpoint)
            if client is None:
                self._relay.listen(channel, swtpm_endpoints.listener(endpoint))
            else:
                self._relay.serve(channel, client)

    def run(self) -> None:
        """Relay to the end."""
        self._relay.run()

    def close(self) -> None:
        """Close and remove everything."""
        self._relay.close()
        for endpoint in (self._options.control, self._options.server):
            swtpm_endpoints.remove(endpoint)
        swtpm_process.remove_pid(self._options.pid)


def _connection(folder: Path, channel: Channel) -> socket.socket:
    try:
        return swtpm_control.connect(folder, _NAMES[channel])
    except ManagerError as error:
        raise OSError(str(error)) from error  # one client's, and not the relay's end


def run(options: SwtpmOptions, ready: Ready) -> None:
    """Serve as the command line says until the end, which may be SIGTERM; `ready` is told when clients may come.

    Raises:
        ManagerError: it cannot be served; nothing is left behind.

    """
    _refuse(options)
    managed = _use(options, os.environ)
    wakeup, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    signal.signal(signal.SIGINT, lambda _number, _frame: None)
    signal.set_wakeup_fd(wake.fileno())
    try:
        session = _Session(options, managed, wakeup)
        try:
            if not options.flags.need_init:
                swtpm_control.power_on(managed.folder)
                if options.flags.startup not in (None, "none"):
                    swtpm_control.start_up(managed.folder, managed.family, str(options.flags.startup))
            swtpm_process.write_pid(options.pid)
            ready.say()
            session.run()
        finally:
            session.close()
    finally:
        managed.let_go()
        signal.set_wakeup_fd(-1)
        wakeup.close()
        wake.close()


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

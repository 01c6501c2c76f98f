"""One TPM in swtpm's place, without a manager: from parsed options to a server that runs until it is told to end.

What lives here: the order of things. It is swtpm's own: sockets, keys, pid file, then the TPM where it is to be started
at once, then the system call filter, then service. What must not: how each of them is done.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Final

from frontend_backend.swtpm_options import Interface, SwtpmOptions
from frontend_backend.swtpm_records import ProfileSource, StatePlace
from frontend_backend.swtpm_suboptions import OptionError
from frontend_backend.tpmhdr import Tag, TpmFamily, command
from storage.errors import StorageError
from storage.swtpm_files import Where, open_files
from vtpm_instance import tpm_commands
from vtpm_instance.condition import Condition
from vtpm_instance.errors import InstanceError, LibtpmsError
from vtpm_instance.front_ends import RULES, FrontEnd, Rules
from vtpm_instance.journal import note
from vtpm_instance.libtpms import Tpm
from vtpm_instance.server import Server
from vtpm_instance.swtpm_blobs import SwtpmBlobs
from vtpm_instance.swtpm_keeper import SwtpmKeeper
from vtpm_instance.swtpm_keys import read_key
from vtpm_instance.swtpm_process import Daemon, PidFile, Systemd, enter_filter, wakeup_pipe
from vtpm_instance.swtpm_sockets import Opened, adopted_socket, open_endpoint
from vtpm_instance.swtpm_vtpm import SwtpmVtpm
from vtpm_instance.tpm_commands import Startup

_STARTUP_TYPES: Final = {  # TPM_SU_*; TPM_ST_*
    TpmFamily.TPM_2_0: {"clear": 0, "state": 1},
    TpmFamily.TPM_1_2: {"clear": 1, "state": 2, "deactivated": 3},
}
_LIBTPMS_LEVEL: Final = 4  # --log level=5 is the first at which libtpms speaks
_PROFILE_BYTES: Final = 10 * 1024  # as much as swtpm reads of a profile


def where_of(place: StatePlace, *, tpm2: bool) -> Where:
    """Return where the state is, as the storage has it."""
    return Where(
        path=place.path,
        is_directory=place.is_directory,
        tpm2=tpm2,
        mode=place.mode,
        lock=place.lock,
        backup=place.backup and place.is_directory,
        fsync=place.fsync,
    )


def rules_of(options: SwtpmOptions, control: Opened | None) -> Rules:
    """Return what the platform may do, and what ends the process."""
    handed_over = options.server is not None and options.server.connected is not None
    return replace(
        RULES[FrontEnd.SWTPM],
        highest_locality=3 if options.reject_locality_4 else 4,
        driver_sets_locality=options.allow_set_locality or options.vtpm_proxy,
        auto_shutdown=options.flags.auto_shutdown,
        ends_with_control=control is not None and options.control is not None and options.control.terminate,
        ends_with_data=options.terminate or handed_over or options.interface is Interface.CHARDEV,
        one_command=options.server is not None and options.server.disconnect,
    )


class Service:
    """What is open for one TPM; everything is closed in reverse order by `close`."""

    def __init__(
        self, options: SwtpmOptions, tpm: Tpm, environment: Mapping[str, str], wakeup: int, daemon: Daemon | None
    ) -> None:
        """Serve `options`; nothing is open yet."""
        self._options, self._tpm, self._environment, self._daemon = options, tpm, environment, daemon
        self._family = TpmFamily.TPM_2_0 if options.tpm2 else TpmFamily.TPM_1_2
        self._wakeup = wakeup
        self._open = ExitStack()

    def run(self, program: Any | None, *, logs: bool) -> int:
        """Open, start, serve; `program` is the system call filter, `logs`: standard error is a log file.

        Returns the exit code.

        Raises:
            OptionError: something the command line names cannot be had, or the TPM does not start.

        """
        options = self._options
        try:
            control = self._opened(options.control, "control channel")
            data = self._opened(options.server, "socket")
            vtpm = self._vtpm()
            server = self._server(vtpm, control, data)
            if options.pid is not None:
                pid_file = PidFile(options.pid)
                pid_file.write()
                self._open.callback(pid_file.remove)
            if not options.flags.need_init:
                self._start(vtpm)
            systemd = Systemd(self._environment)
            if self._daemon is not None:
                self._daemon.detach(keep_standard_error=logs)
            enter_filter(program)
            if self._daemon is not None:
                self._daemon.ready()
            systemd.ready()
            server.run()
            return self._end(vtpm)
        finally:
            self._open.close()

    def _opened(self, endpoint: Any, what: str) -> Opened | None:
        if endpoint is None:
            return None
        opened = open_endpoint(endpoint, what)
        self._open.callback(opened.remove_path)
        return opened

    def _vtpm(self) -> SwtpmVtpm:
        options = self._options
        key, migration_key = read_key(options.key), read_key(options.migration_key)
        if options.state is None:
            raise OptionError(
                "SWTPM_NVRAM_Init: Missing backend URI: say where the state is, with --tpmstate or TPM_PATH"
            )
        try:
            files = open_files(where_of(options.state, tpm2=options.tpm2))
        except StorageError as error:
            raise OptionError(str(error)) from error
        self._open.callback(files.close)
        keeper = SwtpmKeeper(
            files, self._family, key, encrypts_exports=migration_key is not None, incoming=options.incoming
        )
        self._tpm.drops_volatile = True  # STORE_VOLATILE may come before Startup
        vtpm = SwtpmVtpm(self._tpm, keeper, self._family, Startup.NONE, _announce)
        vtpm.files = keeper
        vtpm.state_blobs = vtpm.blobs = SwtpmBlobs(
            self._tpm, keeper, self._family, migration_key, releases_lock=options.release_lock_outgoing
        )
        if options.profile is not None:
            self._set_profile(options.profile)
        return vtpm

    def _set_profile(self, source: ProfileSource) -> None:
        if not self._options.tpm2:
            raise OptionError("a profile is for a TPM 2.0")
        if not self._tpm.profiles:
            version = ".".join(map(str, self._tpm.version()))
            raise OptionError(
                f"--profile needs libtpms 0.10 or newer, here is {version}; nothing was made. Leave it out: what "
                "this libtpms makes is what newer ones call profile 'null'"
            )
        try:
            self._tpm.set_profile(_profile_text(source))
        except LibtpmsError as error:
            raise OptionError(f"the profile was refused: {error}") from error

    def _server(self, vtpm: SwtpmVtpm, control: Opened | None, data: Opened | None) -> Server:
        options = self._options
        server = Server(
            vtpm, None, FrontEnd.SWTPM, frozenset({0, os.geteuid()}), self._wakeup, rules=rules_of(options, control)
        )
        self._open.callback(server.close)
        if data is not None:
            if data.connected:
                server.take_data_socket(data.sock)
            else:
                server.add_data_port(data.sock)
        if control is not None:
            if control.connected:
                server.take_control_socket(control.sock)
            else:
                server.add_control_port(control.sock)
        if options.descriptor is not None and options.interface is Interface.SOCKET:
            server.take_data_socket(adopted_socket(options.descriptor))
        if options.interface is Interface.CHARDEV:
            from vtpm_instance.swtpm_chardev import open_device  # noqa: PLC0415 - rare, and the start is to be quick

            open_device(options, server)
        return server

    def _start(self, vtpm: SwtpmVtpm) -> None:
        """Power on before anybody connects, and send Startup where that is wanted, whatever the TPM says to it."""
        try:
            vtpm.power_on(delete_volatile=False)
        except (InstanceError, StorageError) as error:
            raise OptionError(f"{error}\nError: Could not initialize libtpms.") from error
        kind = self._options.flags.startup
        if kind is None or kind == "none":
            return
        tag = Tag.TPM12_REQUEST if self._family is TpmFamily.TPM_1_2 else Tag.TPM2_NO_SESSIONS
        code = tpm_commands.TPM12_STARTUP if self._family is TpmFamily.TPM_1_2 else tpm_commands.TPM2_STARTUP
        packet = command(code, _STARTUP_TYPES[self._family][kind].to_bytes(2), tag)
        result = tpm_commands.code_of(vtpm.execute(packet, 0))
        if result:
            note(f"the TPM answered Startup({kind}) with 0x{result:x}")

    @staticmethod
    def _end(vtpm: SwtpmVtpm) -> int:
        try:
            vtpm.power_off()
        except (InstanceError, StorageError) as error:
            note(f"the last state could not be saved: {error}; the one before it is kept")
            return 1
        return 0


def _announce(condition: Condition, cause: Exception | None) -> None:
    if cause is not None:
        reason = f"{cause}" if cause.__cause__ is None else f"{cause}; because: {cause.__cause__}"
        note(f"the TPM is {condition.name.lower()}: {reason}")


def _profile_text(source: ProfileSource) -> str:
    if source.text is not None:
        return source.text
    try:
        descriptor = source.descriptor if source.file is None else os.open(source.file, os.O_RDONLY | os.O_CLOEXEC)
        assert descriptor is not None, "a profile has a text, a file or a descriptor"
        with open(descriptor, "rb") as file:
            return file.read(_PROFILE_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"Unable to read profile: {error}") from error


def speak_up(tpm: Tpm, level: int, prefix: str | None) -> None:
    """Have libtpms log too, from level 5 on."""
    if level > _LIBTPMS_LEVEL:
        tpm.speak_up(level - _LIBTPMS_LEVEL, f"{prefix or ''}    ")


def serve(
    options: SwtpmOptions,
    tpm: Tpm,
    environment: Mapping[str, str],
    program: Any | None,
    daemon: Daemon | None,
    *,
    logs: bool,
) -> int:
    """Serve one TPM until SIGTERM or whatever else ends it; returns the exit code. Raises OptionError."""
    return Service(options, tpm, environment, wakeup_pipe(), daemon).run(program, logs=logs)

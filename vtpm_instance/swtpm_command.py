"""The command `vtpm-swtpm`, which also answers to the name `swtpm`: one TPM with swtpm's options and state files.

`vtpm-swtpm socket|chardev OPTIONS`. With --manager it becomes `vtpm-swtpm-managed`, with the same words. The exit code
is 0, or 1 for everything else, as swtpm has it; with --manager 2 for wrong words, as the manager's commands have it.

Python takes most of the time that a start takes: what is not needed to serve is not imported (tests/bench measures it).
"""

import gc
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

from frontend_backend.swtpm_options import Interface, SwtpmOptions, parse
from frontend_backend.swtpm_suboptions import OptionError

_FAILURE: Final = 1
_USAGE: Final = 2
_STANDARD_ERROR: Final = 2
_MANAGED: Final = "vtpm-swtpm-managed"
_PREFIX: Final = "swtpm: "


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    _occupy_standard_descriptors()
    words = list(sys.argv[1:] if argv is None else argv)
    program = os.path.basename(sys.argv[0])
    if not words:
        return _complain("Missing TPM interface type.")
    first, rest = words[0], words[1:]
    if first in ("-h", "--help", "-v", "--version"):
        return _general(program, help_wanted=first in ("-h", "--help"))
    if first == "cuse":
        return _complain(
            "The cuse interface is not supported: no maintained binding for CUSE exists. Use the socket interface with "
            "--ctrl and SET_DATAFD, or --vtpm-proxy for a /dev/tpmN."
        )
    try:
        interface = Interface(first)
    except ValueError:
        _complain(f"Unsupported TPM interface type '{first}'.")
        _general(program, help_wanted=True, to=2)
        return _FAILURE
    try:
        return _run(program, parse(interface, rest, os.environ))
    except OptionError as error:
        prefix = "" if error.usage else _PREFIX
        _complain("\n".join(f"{prefix}{line}" for line in str(error).splitlines()))
        if error.usage:
            from vtpm_instance.swtpm_print import usage  # noqa: PLC0415 - only for mistakes

            _complain(usage(program, interface).rstrip())
        managed = any(word.split("=", 1)[0] == "--manager" for word in rest)
        return _USAGE if managed else _FAILURE  # as the manager's other commands; swtpm has 1 for everything


def _occupy_standard_descriptors() -> None:
    """Have no socket or state file in the place of a standard error that is closed: messages would go there."""
    while (descriptor := os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)) <= _STANDARD_ERROR:
        pass
    os.close(descriptor)


def _complain(text: str) -> int:
    os.write(2, f"{text}\n".encode("utf-8", "backslashreplace"))
    return _FAILURE


def _say(text: str) -> int:
    os.write(1, f"{text}\n".encode("utf-8", "backslashreplace"))
    return 0


def _general(program: str, *, help_wanted: bool, to: int = 1) -> int:
    from vtpm_instance.libtpms import the_tpm  # noqa: PLC0415 - only where it is asked for
    from vtpm_instance.swtpm_print import GENERAL, version  # noqa: PLC0415

    text = GENERAL.format(program=program).rstrip() if help_wanted else version(the_tpm())
    return _complain(text) if to == 2 else _say(text)


def _run(program: str, options: SwtpmOptions) -> int:
    if options.help:
        from vtpm_instance.swtpm_print import usage  # noqa: PLC0415 - only where it is asked for

        return _say(usage(program, options.interface).rstrip())
    if options.manager is not None:
        _become_managed(options)
    if _prints(options):
        return _print(options)
    return _serve(options)


def _become_managed(options: SwtpmOptions) -> None:
    """Go on as the manager's own form of this command, which lies beside this one."""
    beside = os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), _MANAGED)
    command = beside if os.path.exists(beside) else _MANAGED
    try:
        os.execvp(command, [_MANAGED, options.interface.value, *options.words])  # noqa: S606 - a command of ours
    except OSError as error:
        raise OptionError(f"{_MANAGED} cannot be run: {error.strerror}; is vtpm-manager installed?") from error


def _prints(options: SwtpmOptions) -> bool:
    return bool(options.print_capabilities or options.print_states or options.print_profiles or options.print_info)


def _print(options: SwtpmOptions) -> int:
    from frontend_backend.tpmhdr import TpmFamily  # noqa: PLC0415 - only where it is asked for
    from storage.errors import StorageError  # noqa: PLC0415
    from vtpm_instance import swtpm_print  # noqa: PLC0415
    from vtpm_instance.errors import InstanceError  # noqa: PLC0415
    from vtpm_instance.libtpms import the_tpm  # noqa: PLC0415
    from vtpm_instance.swtpm_serve import where_of  # noqa: PLC0415

    family = TpmFamily.TPM_2_0 if options.tpm2 else TpmFamily.TPM_1_2
    _prepare(options)
    try:
        if options.print_capabilities:
            return _say(swtpm_print.capabilities(the_tpm(), tpm2=options.tpm2))
        if options.print_states:
            assert options.state is not None, "the parser asks for it"
            return _say(swtpm_print.states(where_of(options.state, tpm2=options.tpm2)))
        flags = swtpm_print.AVAILABLE_PROFILES if options.print_profiles else options.print_info
        return _say(the_tpm().info(family, flags).rstrip(b"\0").decode())
    except (InstanceError, StorageError, OSError) as error:
        raise OptionError(str(error)) from error


def _prepare(options: SwtpmOptions) -> bool:
    """Do what comes before everything else: root directory, user, log; tells whether there is a log."""
    from vtpm_instance import swtpm_process  # noqa: PLC0415 - not for --help

    user = None if options.run_as is None else swtpm_process.User(options.run_as)
    if options.chroot is not None:
        swtpm_process.change_root(options.chroot)
    if user is not None:
        user.become()
    return swtpm_process.open_log(options.log)


def _serve(options: SwtpmOptions) -> NoReturn:
    gc.disable()  # what is loaded now stays: looking for garbage in it would only take time
    # All that is needed is loaded before the root directory changes: there is nothing to load it from afterwards.
    from vtpm_instance import journal, swtpm_process, swtpm_serve  # noqa: PLC0415
    from vtpm_instance.libtpms import the_tpm  # noqa: PLC0415

    if options.pcap is not None:
        raise OptionError("--pcap is not supported: record the sockets instead, e.g. with socat -x")
    if options.server is None and options.descriptor is None and options.control is None and options.device is None:
        _complain(f"{_PREFIX}neither --server, --ctrl nor --fd: nobody can reach this TPM")
    _preload(options)
    journal.begin_with(_PREFIX)
    daemon = swtpm_process.Daemon() if options.daemon else None
    program: Any | None = swtpm_process.filter_program(options.seccomp)
    tpm = _library(the_tpm)
    logs = _prepare(options)
    swtpm_serve.speak_up(tpm, options.log.level, options.log.prefix)
    gc.freeze()
    gc.enable()
    code = swtpm_serve.serve(options, tpm, os.environ, program, daemon, logs=logs)
    # Not by the interpreter's own end: the second thread's would load a library, which the filter does not allow.
    os._exit(code)


def _preload(options: SwtpmOptions) -> None:
    if options.key is not None or options.migration_key is not None:
        import cryptography.hazmat.primitives.ciphers  # noqa: F401, PLC0415 - what is not needed is not loaded
    if options.state is not None and options.state.is_directory:
        import storage.swtpm_directory  # noqa: PLC0415
    elif options.state is not None:
        import storage.swtpm_linear  # noqa: F401, PLC0415
    if options.interface is Interface.CHARDEV:
        import vtpm_instance.swtpm_chardev  # noqa: F401, PLC0415
    if isinstance(options.log.descriptor, int):
        import fcntl  # noqa: F401, PLC0415


def _library(load: Any) -> Any:
    try:
        return load()
    except OSError as error:
        raise OptionError(f"libtpms cannot be loaded: {error}") from error


if __name__ == "__main__":
    sys.exit(main())

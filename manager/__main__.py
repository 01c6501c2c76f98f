"""The command `vtpm-manager`: init, run, check, reseal, recover, status, upgrade, stop."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NoReturn

from frontend_backend.command_line import parsed, whole
from frontend_backend.messages_admin import ExitCode
from manager import cli_approvals, cli_hierarchies, cli_rollback, cli_tpm
from manager.cli import EXIT_CODES, add_verb_arguments, report, run_verb
from manager.cli_store import add_verbs
from manager.cli_upgrade import run_preflight, run_upgrade
from manager.config import (
    SYSTEM_CONFIG,
    SYSTEM_RUNTIME_DIR,
    SYSTEM_STATE_DIR,
    CatalogueConfig,
    Config,
    Layout,
    TpmConfig,
)
from manager.errors import DeniedError, ManagerError, UsageError, refused_by_system
from manager.restoring import refuse_unfinished
from manager.task_errors import expected_error
from manager.verb_table import BY_NAME, SCHEMA_VERSION
from storage.errors import StorageError

_DEFAULTS: Final = TpmConfig()
_MAY_BE_EMPTY: Final = ("catalogue", "running")  # their defaults
_LEVELS: Final = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(int(ExitCode.USAGE), f"{self.prog}: {message}\n")


def _layout(options: argparse.Namespace) -> Layout:
    return Layout(Path(options.state_dir).absolute(), Path(options.runtime_dir).absolute())


def _config_path(options: argparse.Namespace, layout: Layout) -> Path:
    """Return which configuration counts: --config, else the system's for the system's state, else the state's own."""
    if options.config:
        return Path(options.config)
    if layout.state_dir == SYSTEM_STATE_DIR and SYSTEM_CONFIG.exists():
        return SYSTEM_CONFIG
    return layout.config


def _config(options: argparse.Namespace, layout: Layout) -> Config:
    refuse_unfinished(layout.state_dir)
    return Config.load(_config_path(options, layout))


def _prepare_state_dir(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        kind = DeniedError if isinstance(error, PermissionError) else ManagerError
        raise kind(f"cannot make the state directory {path}: {error.strerror}. Nothing was made") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
        raise DeniedError(
            f"this user may not read and write in the state directory {path}; it was not looked into, and nothing was "
            f"made"
        )


def _init(options: argparse.Namespace) -> int:
    from manager.approval_files import TARGETS  # noqa: PLC0415 - --help should not load what it does not need
    from manager.catalogue_place import shown_place  # noqa: PLC0415 - SQLAlchemy
    from manager.hwtpm_hierarchies import Hierarchy  # noqa: PLC0415 - nor the TPM's libraries
    from manager.opening import open_tpm  # noqa: PLC0415
    from manager.provision import InitOptions, check_options, initialise, refuse_existing  # noqa: PLC0415

    layout = _layout(options)
    locality = _DEFAULTS.locality if options.allow_locality is None else options.allow_locality
    if options.no_recovery and options.recovery:
        raise UsageError("--recovery and --no-recovery exclude each other")
    chosen = InitOptions(
        tcti=options.tcti,
        locality=locality,
        pcrs=options.pcrs,
        recovery=Path(options.recovery) if options.recovery else None,
        saa=Path(options.saa) if options.saa else None,
        store_size=options.store_size,
        store=Path(options.store) if options.store else None,
        catalogue=options.catalogue,
        set_hierarchy_auth=options.set_hierarchy_auth,
        hierarchy_auths={Hierarchy(name): auth for name, auth in cli_hierarchies.given_auths(options).items()},
    )
    if chosen.recovery is None and not options.no_recovery:
        raise UsageError(
            "give the recovery public key, --recovery PUB.pem ('vtpm-recovery-key new FILE' makes one), or do without: "
            "--no-recovery --pcrs none"
        )
    check_options(chosen)
    refuse_existing(layout)
    _prepare_state_dir(layout.state_dir)
    with open_tpm(layout, Config(tpm=TpmConfig(tcti=options.tcti, locality=locality))) as tpm:
        store = initialise(layout, chosen, tpm)
    document = {
        "schema": SCHEMA_VERSION,
        "store": str(store),
        "state_dir": str(layout.state_dir),
        "config": str(layout.config),
        "tpm": options.tcti,
        "locality": locality,
        "pcrs": options.pcrs,
        "recovery_key": bool(options.recovery),
        "saa": str(layout.state_dir / TARGETS) if options.saa else None,
        "catalogue": shown_place(layout, Config(catalogue=CatalogueConfig(url=options.catalogue))),
    }
    if options.form == "json":
        print(json.dumps(document, indent=2))
    elif options.saa:
        print(
            f"made store {store} in {layout.state_dir}. It is closed until its approver has signed: take "
            f"{layout.state_dir / TARGETS}/*.json to 'vtpm-approve sign', install what comes back with 'vtpm-manager "
            f"approve APPROVAL...', then 'vtpm-manager run'"
        )
    else:
        print(
            f"made store {store} in {layout.state_dir}; start it with 'vtpm-manager run --state-dir {layout.state_dir}'"
        )
    return int(ExitCode.OK)


def _run(options: argparse.Namespace) -> int:
    from manager.daemon import run  # noqa: PLC0415 - as above
    from manager.upgrade import Command, become  # noqa: PLC0415

    command = Command.of_this_process()
    layout = _layout(options)
    config = _config(options, layout)
    while run(layout, config, command):
        command = become(command)  # comes back when the installed code cannot be run: ours goes on
    return int(ExitCode.OK)


def _preflight(options: argparse.Namespace) -> int:
    layout = _layout(options)
    return run_preflight(layout, _config(options, layout), options.running)


def _upgrade(options: argparse.Namespace) -> int:
    _find_socket(options)
    return run_upgrade(options)


def _check(options: argparse.Namespace) -> int:
    from manager.maintenance import Verdict, check  # noqa: PLC0415 - as above

    layout = _layout(options)
    findings = check(layout, _config(options, layout))
    if options.form == "json":
        rows = [
            {"schema": SCHEMA_VERSION, "check": f.what, "verdict": f.verdict.value, "text": f.text, "code": int(f.code)}
            for f in findings
        ]
        print(json.dumps(rows, indent=2))
    else:
        for finding in findings:
            print(f"{finding.verdict.value:7}{finding.what}: {finding.text}")
    failed = [finding.code for finding in findings if finding.verdict is Verdict.FAILED]
    weak = [finding.code for finding in findings if finding.verdict is Verdict.WEAK]
    if failed:
        return int(failed[-1])
    return int(weak[0]) if weak and not options.allow_weak else int(ExitCode.OK)


def _reseal(options: argparse.Namespace) -> int:
    from manager.approval_key import ApproverPublic  # noqa: PLC0415
    from manager.predicted import parse_predicted  # noqa: PLC0415
    from manager.provision import write_config  # noqa: PLC0415 - as above
    from manager.recovery_key import RecoveryPrivate, read_passphrase  # noqa: PLC0415
    from manager.reseal import reseal  # noqa: PLC0415

    layout = _layout(options)
    config = _config(options, layout)
    recovery = None
    if options.recovery_key:
        passphrase = read_passphrase(options.passphrase_file) if options.passphrase_file else None
        recovery = RecoveryPrivate.load(options.recovery_key, passphrase)
    saa = ApproverPublic.load(options.saa).to_pem().decode("ascii") if options.saa else None
    resealed = reseal(layout, config, recovery, parse_predicted(options.predict), options.pcrs, saa)
    write_config(_config_path(options, layout), resealed.config)
    for what in resealed.done:
        print(f"resealed {what}")
    return _left_closed(resealed.left)


def _left_closed(left: Mapping[str, str]) -> int:
    """Say which groups stay closed; returns the exit code."""
    for name, reason in left.items():
        print(f"group {name} stays closed: {reason}", file=sys.stderr)
    return int(ExitCode.DENIED if left else ExitCode.OK)


def _recover(options: argparse.Namespace) -> int:
    from manager.approval_key import ApproverPublic  # noqa: PLC0415
    from manager.provision import write_config  # noqa: PLC0415 - as above
    from manager.recovery import recover, recover_group  # noqa: PLC0415
    from manager.recovery_key import RecoveryPrivate, read_passphrase  # noqa: PLC0415

    layout = _layout(options)
    config = _config(options, layout)
    if options.tcti:
        config = replace(config, tpm=replace(config.tpm, tcti=options.tcti))
    passphrase = read_passphrase(options.passphrase_file) if options.passphrase_file else None
    key = RecoveryPrivate.load(options.key, passphrase)
    saa = ApproverPublic.load(options.saa).to_pem().decode("ascii") if options.saa else None
    if options.group:
        vtpms = recover_group(layout, config, options.group, key, saa)
        opens = "for its new approver, who has to approve it" if saa else "to the hardware TPM as it is now"
        print(f"recovered group {options.group}: {vtpms} vTPMs; its key is sealed {opens}")
        return int(ExitCode.OK)
    if saa is not None:
        raise UsageError("--saa belongs to --group; of the installation: 'vtpm-manager reseal --recovery-key --saa'")
    done, recovered = recover(layout, config, key)
    write_config(_config_path(options, layout), recovered)
    print(f"recovered store {done.store}: {len(done.groups)} groups, {done.vtpms} vTPMs, sequence {done.sequence}")
    print("rollback protection starts anew: that this is the newest store could not be checked", file=sys.stderr)
    return _left_closed(done.left)


def _find_socket(options: argparse.Namespace) -> None:
    if options.socket is None and options.runtime_dir != str(SYSTEM_RUNTIME_DIR):
        options.socket = str(_layout(options).admin_socket)


def _verb(options: argparse.Namespace) -> int:
    _find_socket(options)
    return run_verb(BY_NAME[options.verb], options)


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--state-dir", default=str(SYSTEM_STATE_DIR), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--runtime-dir", default=str(SYSTEM_RUNTIME_DIR), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--config", metavar="FILE", help="default: DIR/config.toml, written by init")
    parser.add_argument("--log-level", choices=sorted(_LEVELS), default="info")


def _add_init_options(init: argparse.ArgumentParser) -> None:
    init.add_argument(
        "--tcti",
        default=_DEFAULTS.tcti,
        help="embedded | swtpm:path=P | tis:locality=2 | device:/dev/tpmrm0 (default: %(default)s)",
    )
    init.add_argument(
        "--pcrs", default=_DEFAULTS.pcrs, help="PCRs that the keys are bound to, or none (default: %(default)s)"
    )
    init.add_argument("--recovery", metavar="PUB.pem", help="recovery public key, made by vtpm-recovery-key")
    init.add_argument(
        "--saa", metavar="PUB.pem", help="the approver's public key (vtpm-approve): it says what PCRs must be"
    )
    init.add_argument("--no-recovery", action="store_true", help="no escrow: a lost TPM loses everything")
    init.add_argument("--allow-locality", type=int, choices=(0,), help="use the weaker locality 0")
    init.add_argument("--store-size", type=int, default=2 * 1024 * 1024, metavar="BYTES", help="default: %(default)s")
    init.add_argument(
        "--store", metavar="PATH", help="file or block device for the store (default: in the state directory)"
    )
    init.add_argument(
        "--catalogue",
        default="",
        metavar="URL",
        help="a PostgreSQL database for the catalogue (default: a file in the state directory)",
    )
    cli_hierarchies.add_init_options(init)
    init.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="vtpm-manager", description="The vTPM manager.", epilog=EXIT_CODES)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, call: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text, epilog=EXIT_CODES)
        _add_places(made)
        made.set_defaults(call=call, form="people")
        return made

    _add_init_options(verb("init", _init, "make a new installation: keys sealed to the hardware TPM, an empty store"))
    verb("run", _run, "serve until SIGTERM")
    check = verb("check", _check, "check configuration, permissions, TPM and store; fails on weak settings")
    check.add_argument("--allow-weak", action="store_true", help="weak settings are shown, but do not fail")
    check.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")
    reseal = verb("reseal", _reseal, "seal the keys anew to the PCRs of now, after or before a firmware change")
    reseal.add_argument("--recovery-key", metavar="FILE", help="open the old seals with it (PCRs have changed)")
    reseal.add_argument("--passphrase-file", metavar="FILE", help="passphrase of the recovery key")
    reseal.add_argument("--predict", action="append", default=[], metavar="PCR=HEX", help="also seal to this value")
    reseal.add_argument("--pcrs", help="bind to another selection from now on")
    reseal.add_argument("--saa", metavar="PUB.pem", help="another approver from now on, as where his key is lost")
    recover = verb("recover", _recover, "the TPM was cleared, replaced or lost: provision the new one from the escrow")
    recover.add_argument(
        "--group", metavar="NAME", help="open this group only, by its own recovery key, on a TPM that was recovered"
    )
    recover.add_argument("--saa", metavar="PUB.pem", help="with --group: another approver from now on")
    recover.add_argument("--key", required=True, metavar="FILE", help="the recovery key")
    recover.add_argument("--passphrase-file", metavar="FILE", help="passphrase of the recovery key")
    recover.add_argument("--tcti", help="the new hardware TPM, if it is reached in another way")
    ready = verb("preflight", _preflight, "say whether this code can take over from a running manager (upgrade asks)")
    ready.add_argument("--running", default="", metavar="JSON", help="what the running manager writes and speaks")
    add_verb_arguments(verb("upgrade", _upgrade, BY_NAME["upgrade"].help), BY_NAME["upgrade"])
    for name in ("status", "stop", "backup", "scrub", "compact"):
        add_verb_arguments(verb(name, _verb, BY_NAME[name].help), BY_NAME[name])
    add_verbs(verb, _layout, _config)
    cli_approvals.add_verbs(verb, _layout, _config)
    cli_hierarchies.add_verb(verb, _layout, _config)
    cli_rollback.add_verb(verb, _layout, _config)
    cli_tpm.add_verb(verb, _layout, _config, _verb)
    return parser


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run `vtpm-manager VERB`. Returns the exit code."""
    options = parsed(_parser(), argv, _MAY_BE_EMPTY)
    under_systemd = "JOURNAL_STREAM" in os.environ
    logging.basicConfig(
        level=_LEVELS[options.log_level],
        format="%(levelname)s %(name)s: %(message)s"
        if under_systemd
        else "%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(options.call(options))
    except ManagerError as error:
        return report(error, options.form, f"vtpm-manager {options.verb}")
    except OSError as error:
        return report(refused_by_system(error), options.form, f"vtpm-manager {options.verb}")
    except StorageError as error:
        return report(ManagerError(str(error)), options.form, f"vtpm-manager {options.verb}")
    except BaseExceptionGroup as group:
        first = expected_error(group, ManagerError)
        if not isinstance(first, ManagerError):
            raise
        return report(first, options.form, f"vtpm-manager {options.verb}")


if __name__ == "__main__":
    sys.exit(main())

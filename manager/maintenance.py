"""`vtpm-manager check`: what an administrator can find out while no manager runs."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from frontend_backend.messages_admin import ExitCode
from manager import confinement
from manager.config import Config, Layout
from manager.config_check import problems
from manager.errors import BusyError, DeniedError, ManagerError
from manager.hwtpm import HardwareTpm
from manager.hwtpm_localities import survey
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.keeper_sockets import describe_all
from manager.keys import BootArea, GroupSeal
from manager.opening import Opened, integrity, locked_store, open_store, open_tpm, permissions_problem, read_boot_area
from manager.provision import PCRS_NONE
from manager.recovery_key import RecoveryPublic


class Verdict(StrEnum):
    """What a check found."""

    OK = "ok"
    WEAK = "weak"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `vtpm-manager check`; `code` is the exit code it asks for."""

    what: str
    verdict: Verdict
    text: str
    code: ExitCode = ExitCode.OK


def check(layout: Layout, config: Config) -> list[Finding]:
    """Check configuration, permissions, hardware TPM, seals, store and anchors, without changing anything.

    While a manager runs, the TPM and the store are its own: then only what is outside is checked.
    """
    findings = [
        *_check_settings(config),
        *_check_words(layout, config),
        *_check_permissions(layout, config),
        _check_runtime(layout),
    ]
    findings += [Finding(f"keeper at {path}", Verdict.OK, said) for path, said in describe_all(layout)]
    findings += _check_confinement(config)
    try:
        with locked_store(layout) as descriptor:
            findings += _check_inside(layout, config, descriptor)
    except BusyError:
        findings.append(
            Finding("manager", Verdict.OK, "it runs, so TPM and store are its own: see 'vtpm-manager status'")
        )
    except ManagerError as error:
        findings.append(_failed("store", error))
    return findings


def _check_settings(config: Config) -> list[Finding]:
    findings = []

    def judge(what: str, weak: bool, text: str, weakness: str) -> None:
        verdict = Verdict.WEAK if weak else Verdict.OK
        findings.append(Finding(what, verdict, weakness if weak else text, ExitCode.FAILURE if weak else ExitCode.OK))

    kind = TctiSetting.parse(config.tpm.tcti).kind
    judge(
        "tpm.tcti",
        kind is TctiKind.EMBEDDED,
        config.tpm.tcti,
        "embedded: its keys lie in a file of the state directory; for demos and tests only",
    )
    judge("tpm.locality", config.tpm.locality != 2, "2", "0: the host's own software can unseal the manager's keys")
    judge("tpm.pcrs", config.tpm.pcrs == PCRS_NONE, config.tpm.pcrs, "none: any software at locality 2 can unseal")
    return findings


def _check_words(layout: Layout, config: Config) -> list[Finding]:
    return [_failed(what, error) for what, error in problems(layout, config)]


def _check_permissions(layout: Layout, config: Config) -> list[Finding]:
    findings = []
    catalogue = [] if config.catalogue.url else [layout.catalogue]
    for path in (layout.state_dir, layout.config, layout.store, *catalogue):
        if not path.exists():
            findings.append(Finding(str(path), Verdict.FAILED, "it is missing", ExitCode.NOT_FOUND))
            continue
        problem = permissions_problem(path)
        verdict = Verdict.FAILED if problem else Verdict.OK
        code = ExitCode.FAILURE if problem else ExitCode.OK
        findings.append(Finding(str(path), verdict, problem or "only its owner may use it", code))
    return findings


def _check_runtime(layout: Layout) -> Finding:
    try:
        layout.check()
    except ManagerError as error:
        return _failed("runtime directory", error)
    return Finding("runtime directory", Verdict.OK, str(layout.runtime_dir))


def _check_confinement(config: Config) -> list[Finding]:
    """Try out what a keeper started from here would shut instances in with."""
    try:
        found = confinement.probe(config.instance)
    except ManagerError as error:
        return [_failed("instances", error)]
    findings = []
    for feature in found.features:
        what = f"instances: {feature.name}"
        if feature.active:
            findings.append(Finding(what, Verdict.OK, "active"))
        elif feature.name in config.instance.require:
            findings.append(Finding(what, Verdict.FAILED, f"required, but not active: {feature.why}", ExitCode.DENIED))
        else:
            findings.append(Finding(what, Verdict.WEAK, f"not active: {feature.why}", ExitCode.FAILURE))
    return findings


def _check_inside(layout: Layout, config: Config, descriptor: int) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings += _check_localities(config)
        with open_tpm(layout, config) as tpm:
            report = tpm.check_locality()
            proved = "and refused at 0" if report.refused_at_zero else "locality 0 could not be tried"
            findings.append(Finding("hardware TPM", Verdict.OK, f"answers at locality {report.locality}, {proved}"))
            findings.append(_check_lockout(tpm))
            findings += _check_store(tpm, config, descriptor)
    except ManagerError as error:
        findings.append(_failed("hardware TPM", error))
    return findings


def _check_localities(config: Config) -> list[Finding]:
    """Say which localities the registers of this machine's TPM grant; for `device:` too, which could do better."""
    setting = TctiSetting.parse(config.tpm.tcti)
    if setting.kind not in {TctiKind.TIS, TctiKind.CRB, TctiKind.DEVICE}:
        return []
    findings = []
    for tried in survey(setting):
        ours = setting.kind is not TctiKind.DEVICE and tried.locality in {None, setting.locality}
        weak = ours and not tried.usable
        what = "TPM's registers" if tried.locality is None else f"locality {tried.locality}"
        code = ExitCode.TPM_UNAVAILABLE if weak else ExitCode.OK
        findings.append(Finding(what, Verdict.WEAK if weak else Verdict.OK, tried.text, code))
    return findings


def _check_lockout(tpm: HardwareTpm) -> Finding:
    what = "hardware TPM: lockout password"
    if tpm.properties().lockout_auth_set:
        return Finding(what, Verdict.OK, "set")
    text = (
        "empty: whoever reaches the TPM, at any locality, can clear it, and every vTPM waits for 'vtpm-manager recover'"
    )
    return Finding(what, Verdict.WEAK, text, ExitCode.FAILURE)


def _check_store(tpm: HardwareTpm, config: Config, descriptor: int) -> list[Finding]:
    def step(what: str, call: Callable[[], str]) -> Finding:
        try:
            return Finding(what, Verdict.OK, call())
        except ManagerError as error:
            return _failed(what, error)

    def recovery() -> str:
        boot: BootArea = read_boot_area(descriptor)[1]
        if not boot.recovery:
            raise DeniedError("there is no recovery key: a lost TPM loses every vTPM")
        return RecoveryPublic.parse(boot.recovery.encode(), "the store").escrow_fingerprint

    findings = [step("recovery key", recovery)]
    try:
        opened = open_store(descriptor, tpm, config)
    except ManagerError as error:
        return [*findings, _failed("seals, store and anchors", error)]
    try:
        with integrity():
            statistics = opened.store.statistics()
        text = f"opens; {statistics.vtpms} vTPMs; last stop: {opened.standing.value}"
        return [*findings, Finding("seals, store and anchors", Verdict.OK, text), *_check_groups(opened)]
    finally:
        opened.store.close()
        opened.secret.wipe()


def _check_groups(opened: Opened) -> list[Finding]:
    """Tell of each group whether its key can be had: a closed one is no fault of the others."""
    findings = []
    for group, record in opened.store.groups().items():
        what, reason = f"group {GroupSeal.unpack(record.blob).name}", opened.closed.get(group)
        if reason is not None:
            findings.append(Finding(what, Verdict.FAILED, f"closed: {reason}", ExitCode.DENIED))
        else:
            findings.append(Finding(what, Verdict.OK, f"opens; {opened.store.count(group)} vTPMs"))
    return findings


def _failed(what: str, error: ManagerError) -> Finding:
    return Finding(what, Verdict.FAILED, str(error), error.code)

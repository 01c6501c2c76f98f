"""`vtpm-manager reseal` and `check`: what an administrator does while no manager runs."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from frontend_backend.messages_admin import ExitCode
from manager import confinement
from manager.anchor import clean_stop
from manager.anchoring import note_present
from manager.catalogue_place import place_of
from manager.config import Config, Layout
from manager.errors import BusyError, DeniedError, IntegrityError, ManagerError, UsageError
from manager.group_rows import follow_seals
from manager.hwtpm import HardwareTpm
from manager.hwtpm_setting import TctiKind, TctiSetting
from manager.keeper_sockets import describe_all
from manager.keys import BootArea, GroupSeal, catalogue_key
from manager.opening import (
    Opened,
    Unsealer,
    integrity,
    locked_store,
    open_store,
    open_tpm,
    permissions_problem,
    read_boot_area,
)
from manager.policy import SealPolicy, parse_pcrs
from manager.provision import PCRS_NONE, group_reference, platform_reference, policy_for
from manager.recovery_key import RecoveryPrivate, RecoveryPublic
from storage.catalogue import Catalogue
from storage.secrets import GroupKey
from storage.store_records import GroupRecord, PutGroup

_log = logging.getLogger("vtpm.maintenance")

_PCR_DIGEST_SIZE = 32


# --- reseal ----------------------------------------------------------------------------------------


def parse_predicted(pairs: list[str]) -> dict[int, bytes]:
    """Return PCR values written as PCR=HEX.

    Raises:
        UsageError: not of that form, or not 32 bytes.

    """
    predicted: dict[int, bytes] = {}
    for pair in pairs:
        pcr, equals, value = pair.partition("=")
        try:
            digest = bytes.fromhex(value)
        except ValueError:
            digest = b""
        if not equals or not pcr.isdecimal() or len(digest) != _PCR_DIGEST_SIZE:
            raise UsageError(f"'{pair[:80]}' is no predicted PCR: write PCR=HEX with 64 hexadecimal digits")
        predicted[int(pcr)] = digest
    return predicted


def reseal(
    layout: Layout, config: Config, recovery: RecoveryPrivate | None, predicted: dict[int, bytes], pcrs: str | None
) -> tuple[list[str], Config]:
    """Seal every key anew to the PCR values of now (and to predicted ones beside them).

    Returns what was done, and the configuration to keep from now on.

    With `recovery` the old seals are opened by the recovery key, whatever the PCRs are; without it by their policy.

    Raises:
        DeniedError: the policy does not hold and no recovery key was given. ManagerError: see the messages.

    """
    selection = pcrs or config.tpm.pcrs
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        _, boot = read_boot_area(descriptor)
        public = RecoveryPublic.parse(boot.recovery.encode(), "the store's boot area") if boot.recovery else None
        if selection != PCRS_NONE and public is None:
            raise UsageError("this installation has no recovery key, so no PCRs can be bound: --pcrs none")
        values = _predicted_values(tpm, selection, predicted)
        if public is not None and public.signing_point != boot.platform.policy.recovery_point:
            raise IntegrityError(
                "the recovery key in the store's boot area is not the one that the store key is sealed to: somebody "
                "changed it. Nothing was changed"
            )
        unseal = _unsealer(tpm, recovery)
        opened = open_store(descriptor, tpm, config, unseal)
        try:
            note_present(opened.store, tpm.pcr22_read() if tpm.locality == 2 else None)
            done = _reseal_all(
                tpm, opened, unseal, lambda reference: policy_for(tpm, selection, public, reference, values)
            )
            if opened.closed:
                raise DeniedError(f"not resealed: {'; '.join(opened.closed.values())}")
            digest = clean_stop(opened.store.digest())
            tpm.anchor_write(boot.anchor, opened.secret.anchor_auth, digest)
            _tell_catalogue(layout, config, opened)
        finally:
            opened.store.close()
            opened.secret.wipe()
    return done, replace(config, tpm=replace(config.tpm, pcrs=selection))


def _tell_catalogue(layout: Layout, config: Config, opened: Opened) -> None:
    """Have the catalogue's groups say what their keys are sealed to now; without a catalogue the reseal is done too."""
    key = catalogue_key(opened.secret.store_key, opened.store.uuid)
    try:
        with integrity(), Catalogue.open(place_of(layout, config), key, opened.store.uuid) as catalogue:
            follow_seals(catalogue, opened.store)
    except ManagerError as error:
        _log.warning("resealed, but the catalogue does not say so ('vtpm-verify' will): %s", error)


def _unsealer(tpm: HardwareTpm, recovery: RecoveryPrivate | None) -> Unsealer:
    if recovery is None:
        return tpm.unseal
    return lambda blob: tpm.unseal_with_recovery(blob, recovery.sign_statement)


def _predicted_values(tpm: HardwareTpm, selection: str, predicted: dict[int, bytes]) -> tuple[dict[int, bytes], ...]:
    if not predicted:
        return ()
    bound = parse_pcrs(selection) if selection != PCRS_NONE else ()
    stray = sorted(set(predicted) - set(bound))
    if stray:
        raise UsageError(f"PCR {stray[0]} is predicted but not bound ({selection})")
    return (tpm.pcr_values_to_seal(bound) | predicted,)


def _reseal_all(tpm: HardwareTpm, opened: Opened, unseal: Unsealer, policy: Callable[[bytes], SealPolicy]) -> list[str]:
    """Reseal groups first, the platform object last: what was interrupted can be done again with the same key."""
    store, done = opened.store, []
    for group, record in store.groups().items():
        if group in opened.closed:
            continue
        seal = GroupSeal.unpack(record.blob)
        key = GroupKey(unseal(seal.sealed))
        blob = replace(seal, sealed=tpm.seal(key.reveal(), policy(group_reference(group)))).pack()
        store.commit([PutGroup(GroupRecord(group, record.flags, blob), key)])
        done.append(f"group {seal.name}")
    sealed = tpm.seal(opened.secret.reveal(), policy(platform_reference(store.uuid)))
    store.write_boot_area(replace(opened.boot, platform=sealed).pack())
    return [*done, "the store key"]


# --- check -----------------------------------------------------------------------------------------


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
    findings = [*_check_settings(config), *_check_permissions(layout, config), _check_runtime(layout)]
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
        with open_tpm(layout, config) as tpm:
            report = tpm.check_locality()
            proved = "and refused at 0" if report.refused_at_zero else "locality 0 could not be tried"
            findings.append(Finding("hardware TPM", Verdict.OK, f"answers at locality {report.locality}, {proved}"))
            findings += _check_store(tpm, config, descriptor)
    except ManagerError as error:
        findings.append(_failed("hardware TPM", error))
    return findings


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

    def store() -> str:
        opened = open_store(descriptor, tpm, config)
        try:
            with integrity():
                statistics = opened.store.statistics()
            if opened.closed:
                raise DeniedError("; ".join(opened.closed.values()))
            return f"opens; {statistics.vtpms} vTPMs; last stop: {opened.standing.value}"
        finally:
            opened.store.close()
            opened.secret.wipe()

    return [step("recovery key", recovery), step("seals, store and anchors", store)]


def _failed(what: str, error: ManagerError) -> Finding:
    return Finding(what, Verdict.FAILED, str(error), error.code)

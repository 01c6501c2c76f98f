"""The command `vtpm-approve`: make an approver's key, sign approvals, show and check them. No TPM and no manager."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from frontend_backend.command_line import parsed, whole
from frontend_backend.messages_admin import ExitCode
from manager.approval import Approval
from manager.approval_errors import ApprovalElsewhere, ApprovalError, ApprovalStale, SignerKeyExists
from manager.approval_input import chosen_values, parse_time, read_target, read_text, read_values
from manager.approval_key import ApproverPrivate, ApproverPublic
from manager.approval_target import Target, moment, untimely
from manager.errors import ManagerError, UsageError
from manager.key_files import PUBLIC_MODE, write_new, write_pair
from manager.policy import parse_pcrs
from manager.predicted import parse_predicted
from manager.recovery_key import read_passphrase

JSON_SCHEMA: Final = "vtpm-approve/1"


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run `vtpm-approve`. Returns an ExitCode; argparse itself exits with 2 for wrong usage."""
    options = parsed(_parser(), argv, ("comment",))
    try:
        document = options.call(options)
    except ManagerError as error:
        if options.json:
            print(json.dumps({"schema": JSON_SCHEMA, "error": str(error), "code": int(error.code)}))
        else:
            print(f"vtpm-approve: {error}", file=sys.stderr)
        return int(error.code)
    code = document.pop("code", ExitCode.OK)
    if options.json:
        print(json.dumps({"schema": JSON_SCHEMA} | document))
    else:
        for name, value in document.items():
            if value is not None:
                print(f"{name + ':':18}{value}")
    return int(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtpm-approve",
        description="The approver's (SAA's) tool: says which platform configurations may open a vTPM manager's keys.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, call: Callable[[argparse.Namespace], dict[str, Any]], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        made.set_defaults(call=call)
        return made

    new = verb("new-key", _new_key, "write FILE (private, mode 0600) and FILE.pub; never overwrites")
    new.add_argument("file", metavar="FILE")
    new.add_argument("--passphrase-file", metavar="PATH", help="its first line protects the private key")
    sign = verb("sign", _sign, "sign an approval of a platform configuration")
    sign.add_argument("--key", required=True, metavar="FILE", help="the approver's private key")
    sign.add_argument("--passphrase-file", metavar="PATH", help="its first line opens the private key")
    _add_target(sign, required=True)
    _add_values(sign)
    sign.add_argument("--sequence", required=True, type=int, metavar="N", help="higher ones revoke lower ones")
    sign.add_argument("--valid-from", metavar="TIME", help="ISO 8601, UTC where it names no zone")
    sign.add_argument("--valid-until", metavar="TIME", help="likewise; the manager's clock decides, not the TPM")
    sign.add_argument("--comment", default="", help="at most 200 bytes, shown wherever the approval is")
    sign.add_argument(
        "--previous",
        metavar="APPROVAL",
        help="an earlier one that you signed: refuse another index, slot or store, or fewer PCRs",
    )
    sign.add_argument("-o", "--output", required=True, metavar="APPROVAL", help="a new file")
    show = verb("show", _show, "print what an approval says; with --saa whether it is genuine")
    check = verb("check", _check, "check an approval; exits with 6 if it is not genuine, 5 if it does not hold")
    for made in (show, check):
        made.add_argument("approval", metavar="APPROVAL")
        made.add_argument("--saa", metavar="PUB.pem", required=made is check, help="the approver's public key")
    _add_target(check, required=False)
    _add_values(check)
    return parser


def _add_target(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--group", required=required, metavar="FILE", help="what vtpm-group-show --json or init printed of the object"
    )
    parser.add_argument("--name", help="which of several in that file")


def _add_values(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pcr", action="append", default=[], metavar="N=HEX", help="a value; may be given again")
    parser.add_argument(
        "--pcrs-from", metavar="FILE", help="values from vtpm-group-predict --json, a target, or tpm2_pcrread"
    )


def _new_key(options: argparse.Namespace) -> dict[str, Any]:
    passphrase = read_passphrase(options.passphrase_file) if options.passphrase_file else None
    key = ApproverPrivate.new()
    try:
        public = write_pair(options.file, key.to_pem(passphrase), key.public.to_pem())
    except FileExistsError as error:
        raise SignerKeyExists(str(error.filename)) from error
    except OSError as error:
        raise ApprovalError(f"{options.file} could not be written: {error.strerror}. No key was made.") from error
    return {"file": options.file, "public_file": public, "saa": key.public.fingerprint.hex()}


def _sign(options: argparse.Namespace) -> dict[str, Any]:
    target = read_target(options.group, options.name)
    passphrase = read_passphrase(options.passphrase_file) if options.passphrase_file else None
    key = ApproverPrivate.load(options.key, passphrase)
    if key.public.fingerprint != target.approver:
        raise ApprovalElsewhere(options.key, f"{target.name} takes the approver {target.approver.hex()}")
    if options.sequence < target.least:
        raise ApprovalStale("This approval", options.sequence, target.least)
    previous = Approval.from_armoured(read_text(options.previous), options.previous) if options.previous else None
    if previous is not None:
        target.check(previous, key.public, options.previous)
    found = read_values(options.pcrs_from, target) if options.pcrs_from else {}
    values = chosen_values(target, parse_pcrs(target.pcrs), found, parse_predicted(options.pcr))
    if previous is not None and (missing := sorted(set(previous.selection) - set(values))):
        fewer = f"it is for PCR {', '.join(map(str, missing))} too, which this one would leave open"
        raise ApprovalElsewhere(options.previous, fewer)
    approval = Approval(
        kind=target.kind,
        store=target.store,
        group=target.group,
        name=target.name,
        locality=target.locality,
        nv_index=target.nv_index,
        nv_name=target.nv_name,
        slot=target.slot,
        sequence=options.sequence,
        issued=int(time.time()),
        values=tuple(sorted(values.items())),
        approver=target.approver,
        not_before=parse_time(options.valid_from),
        not_after=parse_time(options.valid_until),
        comment=options.comment,
    ).signed(key)
    try:
        write_new(options.output, approval.armoured().encode("ascii"), PUBLIC_MODE)
    except FileExistsError as error:
        raise UsageError(f"{options.output} exists already. It was kept. Choose another name.") from error
    except OSError as error:
        raise ApprovalError(
            f"{options.output} could not be written: {error.strerror}. Choose another place."
        ) from error
    return {"file": options.output} | _fields(approval)


def _show(options: argparse.Namespace) -> dict[str, Any]:
    approval = Approval.from_armoured(read_text(options.approval), options.approval)
    genuine = None
    if options.saa:
        approval.verify(ApproverPublic.load(options.saa), options.approval)
        genuine = True
    return _fields(approval) | {"genuine": genuine}


def _check(options: argparse.Namespace) -> dict[str, Any]:
    approval = Approval.from_armoured(read_text(options.approval), options.approval)
    key = ApproverPublic.load(options.saa)
    approval.verify(key, options.approval)
    target: Target | None = read_target(options.group, options.name) if options.group else None
    if target is not None:
        target.check(approval, key, options.approval)
        if approval.sequence < target.least:
            raise ApprovalStale(options.approval, approval.sequence, target.least)
    present = parse_predicted(options.pcr)
    if options.pcrs_from:
        if target is None:
            raise UsageError("--pcrs-from takes --group, which says whose values they are")
        present = read_values(options.pcrs_from, target) | present
    differing = [pcr for pcr, value in approval.values if pcr in present and present[pcr] != value]
    unknown = [pcr for pcr in approval.selection if pcr not in present]
    late = untimely(approval, time.time())
    holds = not differing and late is None
    return {
        "genuine": True,
        "holds": holds if not unknown or not holds else None,
        "differing": ",".join(map(str, differing)) or None,
        "not_compared": ",".join(map(str, unknown)) or None,
        "reason": late,
        "code": ExitCode.OK if holds else ExitCode.DENIED,
    }


def _fields(approval: Approval) -> dict[str, Any]:
    """Return what an approval says, flat."""
    return {
        "kind": approval.kind.name.lower(),
        "name": approval.name,
        "uuid": str(approval.group) if approval.group.int else None,
        "store": str(approval.store),
        "sequence": approval.sequence,
        "comment": approval.comment or None,
        "issued": moment(approval.issued),
        "valid_from": moment(approval.not_before) if approval.not_before else None,
        "valid_until": moment(approval.not_after) if approval.not_after else None,
        "locality": approval.locality,
        "pcrs": ",".join(f"{pcr}={value.hex()}" for pcr, value in approval.values),
        "revocation_index": f"0x{approval.nv_index:08x}",
        "revocation_name": approval.nv_name.hex(),
        "revocation_slot": approval.slot,
        "reference": approval.reference.hex(),
        "approved_policy": approval.approved_policy().hex(),
        "saa": approval.approver.hex(),
    }


if __name__ == "__main__":
    sys.exit(main())

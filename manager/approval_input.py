"""What `vtpm-approve` reads: targets, PCR values in the forms that tools print them, times. No TPM, no manager."""

import json
import re
from datetime import UTC, datetime
from typing import Any, Final

from manager.approval_errors import ApprovalUnreadable, SignerKeyMissing
from manager.approval_target import Target
from manager.errors import UsageError
from manager.policy_digests import PCR_COUNT
from manager.predicted import parse_predicted

MAX_FILE_BYTES: Final = 4 * 1024 * 1024  # the targets of a thousand groups have less than a MiB
# tpm2_pcrread prints YAML: a bank, then lines like "  7 : 0x9D2E..."
_YAML_BANK: Final = re.compile(r"^\s*(sha\w+)\s*:\s*$")
_YAML_VALUE: Final = re.compile(r"^\s+(\d{1,2})\s*:\s*0x([0-9A-Fa-f]{64})\s*$")


def read_text(path: str) -> str:
    """Return a file's text. Raises SignerKeyMissing (it cannot be read), ApprovalUnreadable (it is no text)."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SignerKeyMissing(path, error.strerror or str(error)) from error
    try:
        if len(content) > MAX_FILE_BYTES:
            raise ApprovalUnreadable(path, f"it is longer than {MAX_FILE_BYTES} bytes")
        return content.decode()
    except UnicodeDecodeError as error:
        raise ApprovalUnreadable(path, "it is no text") from error


def read_target(path: str, name: str | None) -> Target:
    """Return the target in a file that the manager printed; of several the one with this name or UUID.

    Raises ApprovalUnreadable, UsageError.
    """
    documents = _documents(path)
    if name is not None:
        documents = [document for document in documents if name in (document.get("name"), document.get("uuid"))]
    if len(documents) != 1:
        raise UsageError(f"{path} describes {len(documents)} objects to be approved: say which one with --name")
    return Target.from_json(documents[0], path)


def read_values(path: str, target: Target) -> dict[int, bytes]:
    """Return the PCR values in a file: a target's own, `vtpm-group-predict --json`, or what tpm2_pcrread prints.

    Raises ApprovalUnreadable: no values in any of these forms, or two for one PCR.
    """
    text = read_text(path)
    if text.lstrip()[:1] not in ("[", "{"):
        return _yaml_values(text, path)
    pairs: list[str] = []
    for document in _documents(path):
        if document.get("pcr_values") is not None and document.get("reference") == target.reference.hex():
            pairs += str(document["pcr_values"]).split(",")
        elif "pcr" in document and "present" in document and document.get("name") == target.name:
            pairs.append(f"{document['pcr']}={document['present']}")
    return _unique(pairs, path)


def _documents(path: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ApprovalUnreadable(path, f"it is no JSON ({error})") from error
    documents = found if isinstance(found, list) else [found]
    if not all(isinstance(document, dict) for document in documents):
        raise ApprovalUnreadable(path, "it is no JSON that the manager prints")
    return documents


def _yaml_values(text: str, path: str) -> dict[int, bytes]:
    bank, pairs = "", []
    for line in text.splitlines():
        if match := _YAML_BANK.match(line):
            bank = match[1]
        elif bank == "sha256" and (match := _YAML_VALUE.match(line)):
            pairs.append(f"{match[1]}={match[2]}")
    return _unique(pairs, path)


def _unique(pairs: list[str], path: str) -> dict[int, bytes]:
    if not pairs:
        raise ApprovalUnreadable(path, "it has no PCR values of the sha256 bank for this object")
    values: dict[int, bytes] = {}
    for pair in pairs:
        for pcr, value in parse_predicted([pair]).items():
            if values.setdefault(pcr, value) != value:
                raise ApprovalUnreadable(path, f"it has two values for PCR {pcr}")
    return values


def chosen_values(
    target: Target, wanted: tuple[int, ...], found: dict[int, bytes], given: dict[int, bytes]
) -> dict[int, bytes]:
    """Return what is approved: the PCRs that the target asks for, from a file or one by one, and others given.

    Raises UsageError: one that is asked for has no value.
    """
    stray = [pcr for pcr in given if pcr >= PCR_COUNT]
    if stray:
        raise UsageError(f"PCR {stray[0]} does not exist: PCRs are numbered 0 to {PCR_COUNT - 1}")
    values = {pcr: value for pcr, value in found.items() if pcr in wanted} | given
    missing = [str(pcr) for pcr in wanted if pcr not in values]
    if missing:
        raise UsageError(
            f"{target.name} asks for PCR {', '.join(missing)} ({target.pcrs}) too: give --pcr N=HEX or --pcrs-from FILE"
        )
    return values


def parse_time(text: str | None) -> int:
    """Return seconds since 1970 of an ISO 8601 time, UTC where it names no zone; 0 for none. Raises UsageError."""
    if text is None:
        return 0
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(f"'{text[:40]}' is no time: write 2026-11-30 or 2026-11-30T12:00:00Z") from error
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())

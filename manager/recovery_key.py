"""Recovery files on disk, and the command `vtpm-recovery-key`: `new FILE` makes one, `show FILE` prints fingerprints.

Needs no TPM and no manager: make the file on a machine you trust, keep it off line, give the manager FILE.pub.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, Final

from frontend_backend.command_line import parsed, whole
from frontend_backend.messages_admin import ExitCode
from manager.errors import ManagerError
from manager.key_files import write_pair
from manager.recovery_errors import (
    RecoveryFileExists,
    RecoveryFileMissing,
    RecoveryFileUnwritten,
    RecoveryPassphraseWrong,
)
from manager.recovery_pair import RecoveryPrivate, RecoveryPublic, read_recovery_file

__all__ = ["RecoveryPrivate", "RecoveryPublic", "main", "write_recovery_files"]

JSON_SCHEMA: Final = "vtpm-recovery-key/1"


def write_recovery_files(path: str, key: RecoveryPrivate, passphrase: bytes | None = None) -> str:
    """Write `path` (mode 0600) and `path`.pub (0644), durable; returns the second's name.

    Raises RecoveryFileExists and changes nothing if either exists, RecoveryFileUnwritten if the disk refuses.
    """
    try:
        return write_pair(path, key.to_pem(passphrase), key.public.to_pem())
    except FileExistsError as error:
        raise RecoveryFileExists(str(error.filename)) from error
    except OSError as error:
        raise RecoveryFileUnwritten(path, error.strerror or str(error)) from error


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run `vtpm-recovery-key`. Returns an ExitCode; argparse itself exits with 2 for wrong usage."""
    arguments = parsed(_parser(), argv)
    try:
        passphrase = None if arguments.passphrase_file is None else read_passphrase(arguments.passphrase_file)
        document = arguments.call(arguments.file, passphrase)
    except ManagerError as error:
        if arguments.json:
            print(json.dumps({"schema": JSON_SCHEMA, "error": str(error), "code": int(error.code)}))
        else:
            print(f"vtpm-recovery-key: {error}", file=sys.stderr)
        return int(error.code)
    if arguments.json:
        print(json.dumps({"schema": JSON_SCHEMA} | document))
    else:
        for name, value in document.items():
            print(f"{name + ':':22}{value}")
        if arguments.call is _new:
            print(f"Keep {arguments.file} off line and safe; give {document['public_file']} to `vtpm-manager init`.")
    return int(ExitCode.OK)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vtpm-recovery-key",
        description="Make or show the recovery key of a vTPM manager: what opens the store when the TPM is lost.",
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for name, call, text in (
        ("new", _new, "write FILE (private, mode 0600) and FILE.pub; never overwrites"),
        ("show", _show, "print the fingerprints of a private or public recovery file"),
    ):
        verb = verbs.add_parser(name, help=text, description=text)
        verb.add_argument("file", metavar="FILE")
        verb.add_argument("--passphrase-file", metavar="PATH", help="its first line protects the private keys")
        verb.add_argument("--json", action="store_true", help="print one JSON document")
        verb.set_defaults(call=call)
    return parser


def _new(path: str, passphrase: bytes | None) -> dict[str, Any]:
    key = RecoveryPrivate.new()
    public_path = write_recovery_files(path, key, passphrase)
    return {"file": path, "public_file": public_path} | _fingerprints(key.public)


def _show(path: str, passphrase: bytes | None) -> dict[str, Any]:
    pem = read_recovery_file(path)
    private = b"PRIVATE KEY-----" in pem
    public = RecoveryPrivate.parse(pem, passphrase, path).public if private else RecoveryPublic.parse(pem, path)
    return {"file": path, "private": private} | _fingerprints(public)


def _fingerprints(public: RecoveryPublic) -> dict[str, Any]:
    return {"signing_fingerprint": public.signing_fingerprint, "escrow_fingerprint": public.escrow_fingerprint}


def read_passphrase(path: str) -> bytes:
    """Return the first line without its end. Raises RecoveryFileMissing, RecoveryPassphraseWrong if it is empty."""
    try:
        with open(path, "rb") as file:
            passphrase = file.readline().rstrip(b"\r\n")
    except OSError as error:
        raise RecoveryFileMissing(path, error.strerror or str(error)) from error
    if not passphrase:
        raise RecoveryPassphraseWrong(path, given=True)
    return passphrase


if __name__ == "__main__":
    sys.exit(main())

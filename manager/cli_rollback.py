"""`vtpm-manager accept-rollback`: what it prints and asks. What it does: rollback."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from frontend_backend.messages_admin import ExitCode
from manager.config import Config, Layout
from manager.errors import DeniedError
from manager.verb_table import SCHEMA_VERSION

if TYPE_CHECKING:  # they load the TPM's libraries, which --help should not
    from manager.rollback import Acceptance, Rollback

_SHOWN: Final = 50  # losses that are shown to people; --json shows all
MakeVerb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_verb(verb: MakeVerb, layout: Callable[[argparse.Namespace], Layout], config: Callable[..., Config]) -> None:
    """Add `accept-rollback` to the parser that `verb` adds to."""

    def call(options: argparse.Namespace) -> int:
        return _accept(options, layout(options), config(options, layout(options)))

    made = verb("accept-rollback", call, "the newest store is lost: go back to this older one")
    made.add_argument("--key", metavar="FILE", help="the recovery key; without it only what would be lost is shown")
    made.add_argument("--passphrase-file", metavar="FILE", help="passphrase of the recovery key")
    made.add_argument(
        "--confirm", metavar="TEXT", help="without a recovery key: the sentence that would have to be typed"
    )
    made.add_argument("--no-catalogue", action="store_true", help="the catalogue is lost too: no event can be kept")
    made.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")


def _accept(options: argparse.Namespace, layout: Layout, config: Config) -> int:
    """Show what would be lost, ask, and do it. Raises ManagerError."""
    from manager.recovery_key import RecoveryPrivate, read_passphrase  # noqa: PLC0415
    from manager.rollback import refused_store  # noqa: PLC0415

    passphrase = read_passphrase(options.passphrase_file) if options.passphrase_file else None
    key = RecoveryPrivate.load(options.key, passphrase) if options.key else None
    with refused_store(layout, config, key, without_catalogue=options.no_catalogue) as refused:
        if options.form != "json":
            print(_shown(refused.found))
        try:
            done = refused.accept(_confirmation(options, refused))
        except DeniedError as error:
            if options.form != "json":
                raise
            told = {"code": int(error.code), "kind": error.code.name.lower(), "message": str(error)}
            print(json.dumps(_document(refused.found) | {"done": None, "error": told}, indent=2))
            print(f"vtpm-manager {options.verb}: {error}", file=sys.stderr)
            return int(error.code)
        if options.form == "json":
            print(json.dumps(_document(refused.found) | {"done": done}, indent=2))
        else:
            print(f"accepted {done}")
    return int(ExitCode.OK)


def _confirmation(options: argparse.Namespace, refused: "Acceptance") -> str | None:
    if refused.found.recovery_key or options.confirm is not None or not sys.stdin.isatty():
        confirmed: str | None = options.confirm
        return confirmed
    print(f"There is no recovery key to ask for. To go back, type: {refused.found.phrase}", file=sys.stderr)
    return sys.stdin.readline().strip()


def _document(found: "Rollback") -> dict[str, object]:
    return {
        "schema": SCHEMA_VERSION,
        "store": str(found.store),
        "sequence": found.sequence,
        "written": found.written,
        "newest_event": found.newest_event or None,
        "vtpms": found.vtpms,
        "why": found.why,
        "recovery_key": found.recovery_key,
        "closed_groups": list(found.closed),
        "losses": [
            {
                "vtpm": str(loss.vtpm),
                "name": loss.name,
                "text": loss.text,
                "recorded_generation": loss.recorded,
                "newest_generation": loss.newest,
            }
            for loss in found.losses
        ],
    }


def _shown(found: "Rollback") -> str:
    lines = [
        f"store {found.store}, sequence {found.sequence}, {found.vtpms} vTPMs; file written {found.written}",
        f"refused because {found.why}",
        f"newest event in the catalogue: {found.newest_event or 'none'}",
    ]
    lines += [f"group {name} is closed: what it would lose is not known" for name in found.closed]
    for loss in found.losses[:_SHOWN]:
        generations = ""
        if loss.recorded is not None:
            newest = "?" if loss.newest is None else loss.newest
            generations = f" (generation {loss.recorded} here, {newest} in its state image)"
        lines.append(f"  {loss.name or loss.vtpm}: {loss.text}{generations}")
    if len(found.losses) > _SHOWN:
        lines.append(f"  and {len(found.losses) - _SHOWN} more (--json shows all)")
    if not found.losses:
        lines.append("nothing is known to be lost, but saves whose state images are of that time too leave no trace")
    return "\n".join(lines)

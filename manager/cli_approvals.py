"""`vtpm-manager approve` and `approvals`: through the manager where one runs, by opening the store where none does."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

from frontend_backend.messages_admin import ExitCode
from manager.client import request, socket_path
from manager.config import SYSTEM_RUNTIME_DIR, Config, Layout
from manager.errors import ManagerError, NotFoundError, UsageError, refused_by_system
from manager.verb_form import MAX_CONTENT

MakeVerb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_verbs(verb: MakeVerb, layout: Callable[[argparse.Namespace], Layout], config: Callable[..., Config]) -> None:
    """Add both verbs to the parser that `verb` adds to; `layout` and `config` read the options of every verb."""

    def approve_verb(options: argparse.Namespace) -> int:
        return _approve(options, layout(options), lambda: config(options, layout(options)))

    def approvals_verb(options: argparse.Namespace) -> int:
        return _approvals(options, layout(options), config(options, layout(options)))

    made = verb("approve", approve_verb, "install approvals, signed by the approver with vtpm-approve")
    made.add_argument("approval", nargs="+", metavar="APPROVAL", help="a file that vtpm-approve wrote")
    made.add_argument(
        "--revoke-older", action="store_true", help="approvals with a lower sequence never open anything again"
    )
    made.add_argument("--yes", action="store_true", help="also where the approval does not hold on this platform now")
    made.add_argument("--socket", metavar="PATH", help="the manager's admin socket (or VTPM_MANAGER_SOCKET)")
    made.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")
    made = verb("approvals", approvals_verb, "tell what approvals are made for, and which hold; while no manager runs")
    made.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_CONTENT + 1)
    except OSError as error:
        refused = refused_by_system(error)
        raise type(refused)(f"{refused}. Nothing was changed") from error
    if len(content) <= MAX_CONTENT and content.isascii():
        return content.decode("ascii")
    raise UsageError(f"{path} is no approval: it is too long, or no text. Nothing was changed")


def _approve(options: argparse.Namespace, layout: Layout, config: Callable[[], Config]) -> int:
    texts = [_read(path) for path in options.approval]
    if options.socket is None and options.runtime_dir != str(SYSTEM_RUNTIME_DIR):
        options.socket = str(layout.admin_socket)
    done: list[dict[str, Any]] = []
    try:
        for text in texts:
            done.append(_ask(options, text))  # noqa: PERF401 - those before one that is refused are installed
    except NotFoundError as nobody:
        if not isinstance(nobody.__cause__, OSError):
            raise
        done = _offline(options, layout, config(), texts)
    except ManagerError:
        for document in done:
            print(_sentence(document), file=sys.stderr)
        raise
    if options.form == "json":
        print(json.dumps(done, indent=2))
    else:
        for document in done:
            print(_sentence(document))
    return int(ExitCode.OK)


def _ask(options: argparse.Namespace, text: str) -> dict[str, Any]:
    """Have the running manager install one. Raises NotFoundError, caused by an OSError, where none runs."""
    arguments = {"approval": text, "revoke_older": options.revoke_older, "yes": options.yes}
    (document,) = request(socket_path(options.socket), "approve", arguments)
    return document


def _offline(options: argparse.Namespace, layout: Layout, config: Config, texts: list[str]) -> list[dict[str, Any]]:
    from manager.approval import Approval  # noqa: PLC0415 - --help should not load what it does not need
    from manager.approve_offline import Wish, approve  # noqa: PLC0415 - nor the TPM's libraries

    named = [Approval.from_armoured(text, path) for text, path in zip(texts, options.approval, strict=True)]
    return approve(layout, config, Wish(named, options.revoke_older, options.yes))


def _sentence(document: dict[str, Any]) -> str:
    holds = "it holds now"
    if not document["holds"]:
        differing = f": PCR {document['differing']} differ" if document["differing"] else ""
        holds = f"it does not hold on this platform as it is now{differing}"
    return f"installed approval {document['sequence']} of {document['name']}; {holds}"


def _approvals(options: argparse.Namespace, layout: Layout, config: Config) -> int:
    from manager.approve_offline import approvals  # noqa: PLC0415 - as above

    found = approvals(layout, config)
    if options.form == "json":
        print(json.dumps(found, indent=2))
        return int(ExitCode.OK)
    for document in found:
        state = f"opens by approval {document['holds']}" if document["holds"] else "does not open"
        print(
            f"{document['name']}: {state}; {document['approvals']} installed; sequence {document['sequence']} or more"
        )
        if document["reasons"]:
            print(f"  {document['reasons']}")
    if not found:
        print("nothing here has an approver")
    if found and found[0]["closed"]:
        print(f"the store is closed, its groups cannot be told: {found[0]['closed']}", file=sys.stderr)
    return int(ExitCode.OK)

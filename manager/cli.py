"""The commands `vtpm VERB` and `vtpm-VERB`: a parser built from the verb table, one request, one answer printed."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import replace
from typing import Any, Final, NoReturn

from frontend_backend.command_line import ReaderGoneError, parsed, printable, whole
from frontend_backend.messages_admin import ExitCode
from manager.cli_output import print_answer, saved
from manager.client import RemoteError, content_for_verb, open_for_verb, socket_path, stream
from manager.errors import ManagerError, UsageError, refused_by_system
from manager.named_path import place_of
from manager.new_file import check_new
from manager.verb_form import LISTS
from manager.verb_table import BY_NAME, REMOVED_COLUMNS, VERBS, Argument, Verb, command_of
from storage.errors import StorageError

EXIT_CODES: Final = (
    "exit codes: 0 done, 1 failure, 2 usage, 3 not found, 4 exists or conflict, 5 denied, 6 integrity or rollback, "
    "7 hardware TPM unavailable, 8 busy or timeout"
)


class _Parser(argparse.ArgumentParser):
    """argparse, with the usage error's exit code named."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(int(ExitCode.USAGE), f"{self.prog}: {message}\n")


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every verb has."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", dest="form", action="store_const", const="json", help="one JSON document")
    form.add_argument("--jsonl", dest="form", action="store_const", const="jsonl", help="one JSON object a line")
    form.add_argument("--quiet", "-q", dest="form", action="store_const", const="quiet", help="ids only")
    parser.set_defaults(form="people")
    parser.add_argument("--socket", metavar="PATH", help="the manager's admin socket (or VTPM_MANAGER_SOCKET)")


def add_verb_arguments(parser: argparse.ArgumentParser, verb: Verb) -> None:
    """Add what the verb takes."""
    for argument in verb.arguments:
        if argument.positional:
            count = "*" if argument.kind == "list" else None if argument.required else "?"
            parser.add_argument(argument.name, nargs=count, metavar=argument.name.upper(), help=argument.help)
        elif argument.kind in LISTS:
            parser.add_argument(argument.option, dest=argument.name, action="append", default=[], help=argument.help)
        elif argument.kind == "flag":
            parser.add_argument(argument.option, dest=argument.name, action="store_true", help=argument.help)
        else:
            parser.add_argument(
                argument.option,
                dest=argument.name,
                type=int if argument.kind == "int" else str,
                default=argument.default,
                required=argument.required,
                choices=argument.choices or None,
                help=_help(argument),
            )
    if verb.saves:
        parser.add_argument("-o", "--output", metavar="FILE", help="write it to a new file")
    if verb.many:
        parser.add_argument("--no-pager", action="store_true", help="print at once, also on a terminal")
    add_output_options(parser)


def _help(argument: Argument) -> str:
    return argument.help if argument.default is None else f"{argument.help} (default: {argument.default})"


def run_verb(verb: Verb, options: argparse.Namespace) -> int:
    """Ask the manager for `verb` and print its answer. Returns the exit code."""
    try:
        if any(argument.name == "state_dir" for argument in verb.arguments):
            if options.state_dir is not None:
                return _run_offline(verb, options)
            if options.config is not None:
                raise UsageError("--config goes with --state-dir. Nothing was done")
        return _ask(verb, options)
    except ManagerError as error:
        return report(error, options.form, command_of(verb))
    except ReaderGoneError:
        return int(ExitCode.FAILURE if verb.judges else ExitCode.OK)  # nobody has judged the rest
    except OSError as error:
        return report(refused_by_system(error), options.form, command_of(verb))


def _ask(verb: Verb, options: argparse.Namespace) -> int:
    descriptors: list[int] = []
    arguments: dict[str, str | int | bool | tuple[str, ...] | None] = {}
    opened = ExitStack()
    try:
        _fill(verb, options, arguments, descriptors)
        finished = opened.enter_context(_prepared(verb, options, arguments, descriptors))
        answer = stream(
            socket_path(options.socket),
            verb.name,
            arguments,
            tuple(descriptors),
            lambda text: print(text, file=sys.stderr),
        )
        answer = finished(answer)
        with closing(answer):
            many = verb.many or arguments.get("count") is not None
            paged = not getattr(options, "no_pager", False)
            columns = REMOVED_COLUMNS if arguments.get("removed") else verb.columns
            shown = replace(verb, many=many, columns=columns)
            if getattr(options, "output", None) is not None:
                return print_answer(replace(shown, terse=False), saved(verb, options.output, answer), options.form)
            return print_answer(shown, answer, options.form, paged=paged)
    finally:
        opened.close()
        for descriptor in descriptors:
            os.close(descriptor)


def _fill(verb: Verb, options: argparse.Namespace, arguments: dict[str, Any], descriptors: list[int]) -> None:
    """Gather what the manager is asked with; files that are named are opened. Raises ManagerError, OSError."""
    if getattr(options, "output", None) is not None:
        check_new(options.output)
    for argument in verb.arguments:
        if argument.local:
            continue
        value = _read(argument, getattr(options, argument.name))
        if argument.kind == "path" and value is not None:
            descriptors.append(open_for_verb(value))
            value = place_of(value)
        if value is None or (value is False and argument.default is False) or value == []:
            continue  # nothing was said: so a manager of before an upgrade takes the command, too
        arguments[argument.name] = tuple(value) if argument.kind in LISTS else value


def _read(argument: Argument, value: Any) -> Any:
    """Return what an argument is sent as: of files that it names the content, or digests. Raises ManagerError."""
    if argument.kind in ("text", "bytes") and value is not None:
        return content_for_verb(value, argument.kind)
    if argument.kind != "measurements" or not value:
        return value
    from manager.measure_option import from_option  # noqa: PLC0415 - two verbs need it

    return [from_option(word) for word in value]


def _prepared(
    verb: Verb, options: argparse.Namespace, arguments: dict[str, Any], descriptors: list[int]
) -> AbstractContextManager[Callable[[Generator[dict[str, Any]]], Generator[dict[str, Any]]]]:
    """Return what a verb needs of this command beside its arguments, and what it does with the answer."""
    if verb.name not in ("import", "export"):
        return nullcontext(lambda answer: answer)
    from manager.cli_swtpm import prepared  # noqa: PLC0415 - two verbs need it

    return prepared(verb.name, options, arguments, descriptors)


def _run_offline(verb: Verb, options: argparse.Namespace) -> int:
    """Verify an installation that no manager serves: this process opens it."""
    from manager.offline import installation_at, verify_offline  # noqa: PLC0415 - loads the TPM's libraries

    try:
        if bool(options.vtpm) and options.all:
            raise UsageError("name one vTPM, or say --all")
        findings = verify_offline(*installation_at(options.state_dir, options.config), options.vtpm)
        with closing(findings):
            documents = (finding.document() for finding in findings)
            return print_answer(verb, documents, options.form, paged=not options.no_pager)
    except StorageError as error:
        return report(ManagerError(str(error)), options.form, command_of(verb))


def report(error: ManagerError, form: str, who: str) -> int:
    """Print an error as the user asked for answers and return its exit code."""
    code = error.exit_code if isinstance(error, RemoteError) else error.code
    print(f"{who}: {printable(str(error))}", file=sys.stderr)
    if form in ("json", "jsonl"):
        print(json.dumps({"schema": 1, "error": {"code": int(code), "kind": code.name.lower(), "message": str(error)}}))
    return int(code)


def _parser_of_all() -> argparse.ArgumentParser:
    parser = _Parser(prog="vtpm", description="Administer vTPMs.", epilog=EXIT_CODES)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for verb in VERBS:
        add_verb_arguments(verbs.add_parser(verb.name, help=verb.help, description=verb.help, epilog=EXIT_CODES), verb)
    return parser


@whole
def main(argv: Sequence[str] | None = None) -> int:
    """Run `vtpm VERB ...`, or `vtpm-VERB ...` by the name it was started with. Returns the exit code."""
    called = os.path.basename(sys.argv[0])
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = called.removeprefix("vtpm-")
    if argv is None and called != name and name in BY_NAME:
        parser: argparse.ArgumentParser = _Parser(prog=called, description=BY_NAME[name].help, epilog=EXIT_CODES)
        add_verb_arguments(parser, BY_NAME[name])
        return run_verb(BY_NAME[name], parsed(parser, arguments))
    options = parsed(_parser_of_all(), arguments)
    return run_verb(BY_NAME[options.verb], options)


if __name__ == "__main__":
    sys.exit(main())

"""`vtpm-manager tpm-status`: asks the manager that runs, or the TPM itself where none does."""

import argparse
import os
from collections.abc import Callable

from manager.cli import add_verb_arguments
from manager.cli_output import print_answer
from manager.client import SOCKET_VARIABLE, answers
from manager.config import SYSTEM_RUNTIME_DIR, Config, Layout, TpmConfig
from manager.verb_table import BY_NAME

MakeVerb = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_verb(
    verb: MakeVerb,
    layout: Callable[[argparse.Namespace], Layout],
    config: Callable[..., Config],
    online: Callable[[argparse.Namespace], int],
) -> None:
    """Add `tpm-status` to the parser that `verb` adds to; `online` asks a running manager."""
    known = BY_NAME["tpm-status"]

    def call(options: argparse.Namespace) -> int:
        where = layout(options)
        named = options.socket or (where.runtime_dir == SYSTEM_RUNTIME_DIR and os.environ.get(SOCKET_VARIABLE))
        if not options.tcti and (named or answers(str(where.admin_socket))):
            return online(options)
        from manager.tpm_status import offline  # noqa: PLC0415 - --help should not load the TPM's libraries

        asked = _asked(options) if options.tcti else config(options, where)
        return print_answer(known, [offline(where, asked)], options.form)

    made = verb(known.name, call, known.help)
    made.add_argument("--tcti", help="ask this TPM, before there is an installation")
    made.add_argument("--allow-locality", type=int, choices=(0,), help="with --tcti: at the weaker locality 0")
    add_verb_arguments(made, known)


def _asked(options: argparse.Namespace) -> Config:
    usual = TpmConfig()
    locality = usual.locality if options.allow_locality is None else options.allow_locality
    return Config(tpm=TpmConfig(tcti=options.tcti, locality=locality))

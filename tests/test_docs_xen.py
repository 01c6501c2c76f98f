"""docs/xen.md: every command and option that Xen's operators are told to use is there."""

import argparse
import re
import tomllib

import pytest
from generated_docs import DOCS
from test_docs import _check_quote_parser, options_of, verbs_of

from frontend_backend import guest_device
from manager import __main__ as daemon
from manager import cli, cli_approval, cli_xen, cli_xen_instance, recovery_key

TEXT = (DOCS / "xen.md").read_text(encoding="utf-8")
# Xen's own programs, domains of the examples, a unit; vtpm-guest-quote has no parser, and is shown without options
OTHERS = {"vtpm-platforms", "vtpm-stubdom", "vtpm-web1", "vtpm-del", "vtpm-instances", "vtpm-guest-quote"}
PARSERS = {
    "vtpm-manager": daemon._parser(),
    "vtpm-approve": cli_approval._parser(),
    "vtpm-recovery-key": recovery_key._parser(),
    "vtpm-check-quote": _check_quote_parser(),
    "vtpm-guest-device": guest_device._parser(),
    "vtpm-xen": cli_xen._parser(),
    "vtpm-xen-instance": cli_xen_instance._parser(),
}
NAMED = sorted(set(re.findall(r"vtpm-[a-z0-9-]*[a-z0-9]", TEXT)) - OTHERS)


def verb(name: str) -> argparse.ArgumentParser:
    """The parser of `vtpm-NAME`."""
    (found,) = (a for a in cli._parser_of_all()._actions if isinstance(a, argparse._SubParsersAction))
    parser = found.choices[name.removeprefix("vtpm-")]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


@pytest.mark.parametrize("name", NAMED)
def test_every_command_is_there_and_takes_the_options_it_is_shown_with(name: str) -> None:
    settings = tomllib.loads((DOCS.parent / "pyproject.toml").read_text())
    assert name in settings["project"]["scripts"], name
    parser = PARSERS.get(name) or verb(name)
    for line in re.findall(rf"{name}(?![a-z0-9-])([^|`\n#]*)", TEXT):
        used = set(re.findall(r"(?<!\S)--[a-z-]+", line.split(", vtpm-")[0]))
        assert used <= options_of(parser), f"{name}{line}"


def test_verbs_of_the_daemons_are_verbs() -> None:
    for name in ("vtpm-manager", "vtpm-approve", "vtpm-recovery-key", "vtpm-xen"):
        for word in re.findall(rf"`{name} ([a-z-]+)[ `]", TEXT):
            assert word in verbs_of(PARSERS[name]), f"{name} {word}"

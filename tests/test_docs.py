"""What the documents promise of keys, verbs, options, states and tests is what the code has."""

import argparse
import dataclasses
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from generated_docs import DOCS, check_generated

from frontend_backend import guest_device
from frontend_backend.messages_admin import ExitCode
from manager import __main__ as daemon
from manager import check_quote, cli, cli_approval, cli_relay, cli_xen, cli_xen_instance, recovery_key
from manager.config import Config
from manager.running import Stage
from manager.verb_table import BY_NAME, DAEMON_VERBS, STATES, VERBS
from vtpm_instance.control import TABLE, Command, FrontEnd, Role

ROOT = DOCS.parent
MAN = DOCS / "man"
PAGES = sorted(MAN.glob("*.[18]"))
OTHER_STATES = {
    "added",
    "down",
    "detached",
    "quarantined",
    "closed",
    "missing",
    "stale",
    "incoming",
    "frozen",
    "waiting",
}


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its verbs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for made in action.choices.values():
                yield from parsers(made)


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {name for one in parsers(parser) for action in one._actions for name in action.option_strings}


def verbs_of(parser: argparse.ArgumentParser) -> set[str]:
    found = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return set(found[0].choices) if found else set()


def _check_quote_parser() -> argparse.ArgumentParser:
    """All of `vtpm-check-quote`'s parsers under one."""
    parser = argparse.ArgumentParser(add_help=False, parents=[check_quote._judge_parser()], conflict_handler="resolve")
    verbs = parser.add_subparsers()
    for name, make in check_quote._PARSERS.items():
        verbs.add_parser(name, parents=[make()], conflict_handler="resolve")
    return parser


def plain(page: str) -> str:
    """A manual page's text: hyphens, backslashes and font changes resolved."""
    text = (MAN / page).read_text(encoding="utf-8")
    return re.sub(r"\\f[BIRP]|\\&", "", text).replace(r"\-", "-")


def sections(name: str) -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / name).read_text(encoding="utf-8"))


def test_who_may_ask_what_on_the_control_channel_is_the_table_in_the_code() -> None:
    fronts = (FrontEnd.SOCKET, FrontEnd.QEMU, FrontEnd.RING, FrontEnd.PROXY, FrontEnd.XEN, FrontEnd.SWTPM)
    words: dict[frozenset[Role], str] = {frozenset(): "-", frozenset({Role.OWNER}): "owner", frozenset(Role): "all"}
    lines = ["| command | | " + " | ".join(f"`{front.value}`" for front in fronts) + " | TPM | while a command runs |"]
    lines.append("|---" * (len(fronts) + 4) + "|")
    for command, entry in TABLE.items():
        who = [words[frozenset(role for role in Role if (front, role) in entry.allowed)] for front in fronts]
        state = "on" if entry.running else "off" if command is Command.SET_STATEBLOB else ""
        waits = "waits" if entry.alone else "at once"
        lines.append(f"| {command.name} | {command:#04x} | " + " | ".join(who) + f" | {state} | {waits} |")
    check_generated("control-channel.md", "who may ask what", "\n".join(lines) + "\n")


def test_every_configuration_key_is_documented_with_its_default() -> None:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    documented = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if part.startswith("["):
            rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]*)` \|", part, flags=re.MULTILINE)
            documented[part[1 : part.index("]")]] = {key: tomllib.loads(f"x = {value}")["x"] for key, value in rows}
    expected = {
        section: {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}
        for section, content in dataclasses.asdict(Config()).items()
    }
    assert documented == expected


def test_the_sample_configuration_has_every_key_with_its_default() -> None:
    assert Config.from_tree(sections("images/config.toml"), "the sample") == Config()
    keys = {name: set(content) for name, content in sections("images/config.toml").items()}
    assert keys == {name: set(content) for name, content in dataclasses.asdict(Config()).items()}


def test_the_table_of_verbs_is_the_one_in_the_code() -> None:
    lines = ["| verb | what it does | role |", "|---|---|---|"]
    for command, verbs in (("vtpm", VERBS), ("vtpm-manager", DAEMON_VERBS)):
        lines += [f"| `{command} {verb.name}` | {verb.help} | {verb.role.name.lower()} |" for verb in verbs]
    check_generated("commands.md", "verbs", "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("page", "parser"),
    [
        ("vtpm.1", cli._parser_of_all()),
        ("vtpm-manager.8", daemon._parser()),
        ("vtpm-recovery-key.1", recovery_key._parser()),
        ("vtpm-approve.1", cli_approval._parser()),
        ("vtpm-check-quote.1", _check_quote_parser()),
        ("vtpm-relay.8", cli_relay._parser()),
        ("vtpm-xen.8", cli_xen._parser()),
        ("vtpm-xen-instance.8", cli_xen_instance._parser()),
        ("vtpm-guest-device.8", guest_device._parser()),
    ],
)
def test_every_verb_and_option_is_in_the_manual_page(page: str, parser: argparse.ArgumentParser) -> None:
    text = plain(page)
    for verb in verbs_of(parser):
        assert re.search(rf"^\.SS {re.escape(verb)}\b", text, flags=re.MULTILINE), f"{page} does not tell of {verb}"
    missing = {option for option in options_of(parser) if option not in ("-h", "--help") and option not in text}
    assert not missing, f"{page} does not tell of {sorted(missing)}"
    told = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text.split(".SH EXAMPLES")[0]))
    assert not told - options_of(parser), f"{page} tells of options there are not"


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_every_exit_code_is_in_the_manual_page(page: str) -> None:
    status = plain(page).split(".SH EXIT STATUS")[1].split(".SH ")[0]
    codes = {int(code) for code in re.findall(r"^\.B (\d)$", status, flags=re.MULTILINE)}
    if page not in ("vtpm.1", "vtpm-manager.8"):
        assert codes <= set(ExitCode)
    else:
        assert codes == set(ExitCode)


def test_every_exit_code_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {int(code) for code in re.findall(r"^\| (\d) \| ", readme, flags=re.MULTILINE)} == set(ExitCode)


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_manual_pages_are_set_without_a_warning(page: str) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", str(MAN / page)],
        capture_output=True,
        check=False,
        env={"LC_ALL": "C.UTF-8", "MANWIDTH": "100", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b"", done.stderr.decode()


def test_every_state_is_documented_and_no_other() -> None:
    text = (DOCS / "states.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-z-]+)` \|", text, flags=re.MULTILINE))
    assert rows == {stage.value for stage in Stage} | OTHER_STATES == set(STATES)


def test_every_test_named_in_the_threat_model_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", (DOCS / "threat-model.md").read_text(encoding="utf-8")))
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    existing = {name for text in tests for name in re.findall(r"^(?:async )?def (test_\w+)", text, flags=re.MULTILINE)}
    assert named
    assert named <= existing, sorted(named - existing)


def test_every_dependency_is_explained() -> None:
    text = (DOCS / "dependencies.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["dev"]]
    wanted += project["build-system"]["requires"]
    names = {re.split(r"[<>=\[ ]", requirement)[0].lower() for requirement in wanted}
    packages = re.search(r"^PACKAGES=\(([^)]*)\)", (ROOT / "dev").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert packages is not None
    for name in sorted(names | set(packages[1].split())):
        assert name in text.lower(), f"docs/dependencies.md does not tell of {name}"


@pytest.mark.parametrize("path", [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target} is not there"


@pytest.mark.parametrize("path", [*DOCS.rglob("*.md"), ROOT / "README.md", *PAGES], ids=lambda p: p.name)
def test_commands_named_in_documents_exist(path: Path) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    text = path.read_text(encoding="utf-8")
    verbs = verbs_of(daemon._parser())
    for verb in re.findall(r"`vtpm-manager ([a-z][a-z-]+)", text):
        assert verb in verbs, f"{path.name}: vtpm-manager {verb}"
    for name in re.findall(r"^(vtpm-[a-z-]+) ", text, flags=re.MULTILINE):
        assert name in scripts, f"{path.name}: {name}"
    for verb in re.findall(r"`vtpm ([a-z][a-z-]+)", text):
        assert verb in BY_NAME, f"{path.name}: vtpm {verb}"

"""Every command at its edges: closed descriptors, an output that takes no more, Ctrl-C, words that are empty."""

import argparse
import importlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from frontend_backend.command_line import parsed, place, printable
from frontend_backend.messages_admin import ExitCode

ROOT = Path(__file__).parent.parent
ALONE = {  # they stand alone in a guest, or have swtpm's or a keeper's own ways
    "frontend_backend.guest_device:main",
    "frontend_backend.guest_quote:main",
    "vtpm_instance.swtpm_command:main",
    "manager.swtpm_managed:main",
    "vtpm_instance.keeper:main",
}


def run(module: str, *words: str, **more: Any) -> subprocess.Popen[str]:
    """Start a command; what it writes to standard output goes where `more` says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(ROOT)} | more.pop("environment", {})
    command = [sys.executable, "-m", module, *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT, **more)


def ending(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for its end; return its code and what it said on standard error."""
    with process:
        _, said = process.communicate(timeout=60)
        return process.returncode, said


def test_every_command_ends_so() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    bare = set()
    for target in set(scripts.values()):
        module, name = target.split(":")
        if not hasattr(getattr(importlib.import_module(module), name), "__wrapped__"):
            bare.add(target)
    assert bare == ALONE


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["--help"], ["list", "--help"]])
def test_a_full_disk_behind_standard_output_is_a_failure_that_is_told(words: list[str], unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        code, said = ending(run("manager.cli", *words, stdout=full, environment={"PYTHONUNBUFFERED": unbuffered}))
    assert code == ExitCode.FAILURE
    assert "could not be written: No space left on device" in said
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_a_reader_that_is_gone_changes_no_verdict(tmp_path: Path) -> None:
    """`vtpm-check-quote ... | head -1` must not turn a quote that does not hold into one that does."""
    (tmp_path / "ak").write_bytes(public_key())
    (tmp_path / "bundle").write_bytes(b"no quote" * 10)
    words = [str(tmp_path / "bundle"), "--ak", str(tmp_path / "ak"), "--nonce", "00"]
    for unbuffered, form in itertools.product(("", "1"), ((), ("--json",))):
        started = without_reader("manager.check_quote", *words, *form, PYTHONUNBUFFERED=unbuffered)
        assert ending(started) == (ExitCode.INTEGRITY, "")


def test_a_reader_that_is_gone_changes_no_failure(tmp_path: Path) -> None:
    """A failure in JSON was exit code 0 where its line could not be printed."""
    words = ["show", "web1", "--json", "--socket", str(tmp_path / "none")]
    code, said = ending(without_reader("manager.cli", *words, PYTHONUNBUFFERED="1"))
    assert (code, "no manager answers" in said) == (ExitCode.NOT_FOUND, True)


def without_reader(module: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start a command whose output nobody reads any more."""
    near, far = os.pipe()
    os.close(near)
    try:
        return run(module, *words, stdout=far, environment=environment)
    finally:
        os.close(far)


def test_what_the_locale_cannot_write_is_written_all_the_same(tmp_path: Path) -> None:
    path = str(tmp_path / "key–\udcff")
    locale = {"PYTHONIOENCODING": "latin-1"}
    with run("manager.recovery_key", "new", path, stdout=subprocess.PIPE, environment=locale) as started:
        said, wrong = started.communicate(timeout=60)
    assert (started.returncode, wrong) == (ExitCode.OK, "")
    assert "key–\\udcff" in said


def public_key() -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (socket.SOCK_SEQPACKET, ["manager.cli", "list", "--socket"]),
        (socket.SOCK_STREAM, ["manager.cli_xen", "check", "--xenstore"]),  # in tasks, where groups are raised
    ],
)
def test_ctrl_c_is_a_sentence_and_the_death_that_shells_expect(tmp_path: Path, kind: int, words: list[str]) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(path)
        sock.listen()
        started = run(*words, path, stdout=subprocess.DEVNULL)
        manager, _ = sock.accept()
        with manager:
            manager.recv(65536)  # it has asked, and waits for an answer
            started.send_signal(signal.SIGINT)
            code, said = ending(started)
    assert code == -signal.SIGINT
    assert "interrupted" in said
    assert "Traceback" not in said


def test_nothing_is_opened_in_the_place_of_a_closed_descriptor(tmp_path: Path) -> None:
    """tpm2-tss writes to descriptor 2 by itself: where the store had that number, it wrote into the store."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import os, sys
            from frontend_backend.command_line import whole

            @whole
            def main(argv=None):
                store = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
                print("an answer", sys.stdin.isatty(), sys.stdin.readline())
                print("a message", file=sys.stderr)
                os.write(2, b"a library's message")
                os.system("echo of a child; echo of a child >&2")
                return 0 if os.path.getsize(sys.argv[1]) == 0 and store > 2 else 9

            sys.exit(main())
            """
        )
    )
    store = tmp_path / "store.img"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f"exec {sys.executable} {program} {store} 0<&- >&- 2>&-"]
    assert subprocess.run(command, env=environment, timeout=60, check=False).returncode == 0
    assert store.read_bytes() == b""


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("manager.__main__", ["init", "--no-recovery", "--pcrs", "none", "--state-dir", ""]),
        ("manager.__main__", ["init", "--recovery", "r.pub", "--saa", "", "--state-dir", "nowhere"]),
        ("manager.__main__", ["backup", ""]),
        ("manager.cli", ["attach", "web1", "guest", "--owner", ""]),
        ("manager.cli", ["attach", "web1", "guest", "--measure", ""]),
        ("manager.cli", ["add", "--state-image", ""]),
        ("manager.cli", ["verify", "--all", "--state-dir", ""]),
        ("manager.check_quote", ["bundle", "--ak", "ak", "--nonce", "00", "--ca", ""]),
        ("manager.check_quote", ["bundle", "--ak", "ak", "--nonce", "00", "--pcr-policy", ""]),
        ("manager.cli_approval", ["show", "approval", "--saa", ""]),
        ("manager.cli_xen_instance", ["--image", "i", "--guest", ""]),
        ("manager.cli_xen", ["check", "--xenstore", ""]),
        ("manager.cli_xen", ["check", "--runtime-dir", ""]),
        ("manager.cli_xen", ["check", "--runtime-dir="]),
        ("manager.cli_relay", ["key", ""]),
    ],
)
def test_a_word_that_is_empty_is_not_taken_for_one_that_is_missing(
    module: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = importlib.import_module(module).main(words)
    except SystemExit as ended:
        code = ended.code
    assert code == ExitCode.USAGE
    assert "is given, but empty. Nothing was done" in capsys.readouterr().err


def test_defaults_that_are_empty_stay_and_the_working_directory_is_a_place() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--comment", default="")
    parser.add_argument("--directory", type=place)
    assert parsed(parser, [], ("comment",)).comment == ""
    options = parsed(parser, ["--comment", "", "--directory", "."], ("comment",))
    assert (options.comment, options.directory) == ("", Path())


def test_what_steers_a_terminal_is_shown_and_not_sent() -> None:
    assert printable("no vTPM '\x1b[31mred\x07\udcff'\nümlaut") == "no vTPM '\\x1b[31mred\\x07\\udcff'\nümlaut"

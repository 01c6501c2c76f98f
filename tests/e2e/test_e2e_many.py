"""Many vTPMs: vtpm-add --count, and vtpm-list with filters, as lines, and through a pager."""

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from e2e_rig import BIN, Installation, installation

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def many() -> Iterator[Installation]:
    with installation() as made:
        made.init()
        made.start()
        made.command("vtpm-add", "--count", "2000", "--name", "web-{:05}")
        made.add("old", "--tpm", "1.2")
        made.add("busy")
        made.attach("busy", "guest-7")
        yield made


def names(made: Installation, *filters: str) -> list[str]:
    lines = made.command("vtpm-list", *filters, "--jsonl").out.splitlines()
    return [json.loads(line)["name"] for line in lines]


def test_many_are_made_in_order_with_one_write_of_the_anchor(many: Installation) -> None:
    before = many.vtpm_manager("status", "--json").json["anchor_writes"]
    done = many.command("vtpm-add", "--count", "1500", "--name", "db-{}", "--first", "10")
    uuids = done.out.split()
    assert len({UUID(text) for text in uuids}) == 1500
    assert many.vtpm_manager("status", "--json").json["anchor_writes"] == before + 1
    assert "of 1500 vTPMs made" in done.err
    assert many.show("db-10")["uuid"] == uuids[0]
    assert many.show("db-1509")["uuid"] == uuids[-1]
    assert many.show("db-1509")["state"] == "added"


def test_without_a_template_each_is_called_after_its_uuid(many: Installation) -> None:
    documents = many.command("vtpm-add", "--count", "3", "--tpm", "1.2", "--json").json
    assert [row["name"] for row in documents] == [f"vtpm-{UUID(row['uuid']).hex[:12]}" for row in documents]
    assert {row["tpm"] for row in documents} == {"1.2"}
    assert len(documents) == 3


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ["--count", "3", "--name", "web"]),
        (2, ["--count", "3", "--name", "{}-{}"]),
        (2, ["--count", "3", "--name", "a b{}"]),
        (2, ["--count", "3", "--name", "x" * 64 + "{}"]),
        (2, ["--count", "100", "--name", "x" * 63 + "{}"]),
        (2, ["--count", "3", "--name", "web-{:x}"]),
        (2, ["--count", "0"]),
        (2, ["--count", "-1"]),
        (2, ["--count", "100001"]),
        (2, ["--count", "many"]),
        (2, ["--count", "2", "--first", "-1", "--name", "a{}"]),
        (2, ["--count", "2", "--uuid", "12345678-1234-1234-1234-123456789012"]),
        (3, ["--count", "2", "--group", "nowhere"]),
        (4, ["--count", "50", "--name", "web-{:05}", "--first", "1990"]),
        (2, ["--name", "web-{}"]),
    ],
)
def test_wrong_words_make_nothing(many: Installation, code: int, words: list[str]) -> None:
    before = many.vtpm_manager("status", "--json").json["vtpms"]
    answer = many.command("vtpm-add", *words, check=False)
    assert (answer.code, answer.out) == (code, ""), answer.err
    assert answer.err.strip()
    assert many.vtpm_manager("status", "--json").json["vtpms"] == before


def test_a_name_in_use_is_named(many: Installation) -> None:
    answer = many.command("vtpm-add", "--count", "50", "--name", "web-{:05}", "--first", "1990", check=False)
    assert "11 of these names are in use, 'web-01990' first; nothing was made" in answer.err


def test_filters_choose_and_combine(many: Installation) -> None:
    assert names(many, "--guest", "guest-7") == ["busy"]
    assert names(many, "--state", "running") == ["busy"]
    assert names(many, "--guest", "guest-7", "--state", "added") == []
    assert "old" in names(many, "--tpm", "1.2")
    assert "busy" not in names(many, "--tpm", "1.2")
    assert len(names(many, "--group", "default", "--tpm", "2.0")) >= 2001
    assert names(many) == sorted(names(many))
    assert many.command("vtpm-list", "--group", "nowhere", check=False).code == 3
    assert many.command("vtpm-list", "--state", "happy", check=False).code == 2
    assert many.command("vtpm-list", "--guest", "nobody", "--json").json == []


def test_a_listed_document_is_the_shown_one(many: Installation) -> None:
    (listed,) = many.command("vtpm-list", "--guest", "guest-7", "--json").json
    assert listed == many.show("busy")
    assert listed["tcti"].endswith("swtpm.sock")


def test_a_reader_that_has_seen_enough_ends_the_command_well(many: Installation) -> None:
    command = f"{BIN}/vtpm-list --jsonl; echo $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | head -n 2"],
        env=os.environ | {"VTPM_MANAGER_SOCKET": str(many.runtime / "admin.sock")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.strip() == "0"


def on_a_terminal(made: Installation, pager: str, *words: str) -> bytes:
    """Run a command with a terminal for its output; returns what the terminal saw."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"VTPM_MANAGER_SOCKET": str(made.runtime / "admin.sock"), "PAGER": pager}
    with subprocess.Popen([str(BIN / words[0]), *words[1:]], stdout=theirs, env=environment) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the terminal has no other end any more
                break
            if not piece:
                break
            seen += piece
        assert process.wait(30) == 0
    os.close(ours)
    return seen


def test_a_table_is_paged_on_a_terminal_only(many: Installation, tmp_path: Path) -> None:
    mark = tmp_path / "pager"
    mark.write_text(f"#!{sys.executable}\nimport sys\nprint('PAGED', len(sys.stdin.readlines()))\n")
    mark.chmod(0o755)
    filters = ("vtpm-list", "--tpm", "1.2")
    assert b"PAGED" in on_a_terminal(many, str(mark), *filters)
    assert b"UUID" in on_a_terminal(many, str(mark), *filters, "--no-pager")
    assert b"UUID" in on_a_terminal(many, "cat", *filters)
    assert b"UUID" in on_a_terminal(many, "/no/such/pager", *filters)
    assert b'"schema"' in on_a_terminal(many, str(mark), *filters, "--json")
    assert "PAGED" not in many.command(*filters, env={"PAGER": str(mark)}).out


def test_a_full_disk_on_the_way_keeps_what_was_made(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount")
    with installation() as made:
        made.state.mkdir()
        if made.command("mount", "-t", "tmpfs", "-o", "size=6m", "none", str(made.state), check=False).code != 0:
            pytest.skip("needs the right to mount")
        try:
            (made.base / "tpm").mkdir()
            (made.state / "embedded-tpm").symlink_to(made.base / "tpm")  # the TPM has a disk of its own
            made.init()
            made.start()
            answer = made.command("vtpm-add", "--count", "20000", "--name", "web-{}", check=False)
            assert (answer.code, answer.out) == (1, "")
            assert "of 20000 vTPMs were made" in answer.err
            count = int(answer.err.split(" of 20000 vTPMs were made")[0].split()[-1])
            assert len(names(made)) == count
        finally:
            made.tear_down()
            made.manager = None
            made.command("umount", "-l", str(made.state))

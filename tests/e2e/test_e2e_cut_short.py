"""Commands that change an installation, killed at each change: repeatable or refused, never half of one that serves."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Guest, Installation, installation, wait_for
from killed_commands import content_of, killed_at_each_change, needs_strace

from manager.config import Layout
from manager.errors import ConflictError, IntegrityError, ManagerError, NotFoundError
from manager.offline import installation_at
from manager.opening import locked_store
from manager.provision import refuse_existing
from manager.restore import restore

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
# what `vtpm-manager restore` calls; the command itself takes three times as long to start, and there are many
RESTORE = "import sys, pathlib, manager.restore as m; m.restore(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))"


@pytest.fixture(scope="module")
def backed_up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup of an installation with a used vTPM and one that never started."""
    file = tmp_path_factory.mktemp("backup") / "b.tar"
    with installation() as made:
        made.init("--store-size", str(64 * 4096))
        made.start()
        made.add("idle")
        made.add("web")
        guest = Guest(made.attach("web")["endpoint"])
        guest.define(INDEX, 8)
        guest.write(INDEX, b"precious")
        guest.close()
        made.vtpm_manager("backup", str(file))
    return file


def test_a_restore_that_was_killed_serves_nothing_and_can_be_repeated(backed_up: Path, tmp_path: Path) -> None:
    needs_strace()
    restore(backed_up, tmp_path / "whole")
    expected = content_of(tmp_path / "whole")
    assert {"store.img", "catalogue.sqlite", "config.toml"} < expected.keys()
    target, kills, refused = tmp_path / "target", 0, 0
    command = (sys.executable, "-c", RESTORE, str(backed_up), str(target))
    for call in killed_at_each_change(*command, before=lambda: shutil.rmtree(target, ignore_errors=True)):
        kills += 1
        if not (target / "store.img").exists():
            refused += serves_nothing(target)
            restore(backed_up, target)
        assert content_of(target) == expected, f"killed at {call}"
    assert kills > 15
    assert refused > 10, "most of the kills left a part"


def serves_nothing(target: Path) -> bool:
    """No command takes what a killed restore left for an installation; tells whether it left more than a directory."""
    layout = Layout(target, target / "run")
    if not target.exists() or not any(target.iterdir()):
        with pytest.raises(NotFoundError), locked_store(layout):
            pass
        return False
    for use in (lambda: refuse_existing(layout), lambda: installation_at(str(target), None)):
        with pytest.raises(ConflictError, match=r"cut short.*restore' again"):
            use()
    with pytest.raises(NotFoundError), locked_store(layout):
        pass
    return True


def test_every_command_says_that_a_restore_was_cut_short(backed_up: Path, bare: Installation) -> None:
    restore(backed_up, bare.state)
    (bare.state / "store.img").rename(bare.state / "store.img.restoring")
    assert bare.try_start() == 4
    assert "was cut short" in bare.refusal
    assert "vtpm-manager restore' again" in bare.refusal
    for verb in ("check", "init", "rebuild-catalogue"):
        options = ("--tcti", "embedded", "--no-recovery", "--pcrs", "none") if verb == "init" else ()
        answer = bare.vtpm_manager(verb, *options, check=False)
        assert (answer.code, "was cut short" in answer.err) == (4, True), verb
    answer = bare.command("vtpm", "verify", "--state-dir", str(bare.state), check=False)
    assert (answer.code, "was cut short" in answer.err) == (4, True)
    bare.vtpm_manager("restore", str(backed_up))
    assert bare.vtpm_manager("restore", str(backed_up), check=False).code == 4, "a whole one is not overwritten"


def test_what_somebody_else_put_beside_an_unfinished_restore_is_kept(backed_up: Path, tmp_path: Path) -> None:
    for stray in ("mine.txt", "state/mine.txt"):
        target = tmp_path / stray.replace("/", "-")
        restore(backed_up, target)
        (target / "store.img").rename(target / "store.img.restoring")
        (target / stray).write_text("mine")
        with pytest.raises((ConflictError, ManagerError, OSError)):
            restore(backed_up, target)
        assert (target / stray).read_text() == "mine"


def test_a_backup_that_was_cut_anywhere_is_no_backup(backed_up: Path, tmp_path: Path) -> None:
    whole = backed_up.read_bytes()
    end = whole.rindex(b'"format": "vtpm-backup/1"')
    places = [*range(0, end, len(whole) // 25), *range(end - 2048, end, 512), end + 100]
    for place in places:
        (tmp_path / "part.tar").write_bytes(whole[:place])
        with pytest.raises(IntegrityError, match="nothing was changed"):
            restore(tmp_path / "part.tar", tmp_path / "target")
        assert not (tmp_path / "target").exists()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Installation, Path]]:
    """An installation whose manager was killed, so that names are in the catalogue's -wal only; and a copy of it."""
    with installation() as made:
        made.init()
        made.start()
        for name in ("one", "two", "three"):
            made.add(name)
        made.kill()
        for pid in made.processes():
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not made.processes(), "everything to end")
        assert (made.state / "catalogue.sqlite-wal").stat().st_size > 10_000
        copy = tmp_path_factory.mktemp("killed") / "state"
        shutil.copytree(made.state, copy, ignore=shutil.ignore_patterns("*.sock", "*.ctrl", "lock"))
        yield made, copy


def test_a_rebuild_that_was_killed_loses_no_name_and_can_be_repeated(killed: tuple[Installation, Path]) -> None:
    needs_strace()
    made, copy = killed

    def anew() -> None:
        shutil.rmtree(made.state)
        shutil.copytree(copy, made.state)

    places = ("--state-dir", str(made.state), "--runtime-dir", str(made.runtime))
    missing = 0
    calls = "rename,renameat,renameat2"
    for call in killed_at_each_change("vtpm-manager", "rebuild-catalogue", *places, before=anew, calls=calls):
        if not (made.state / "catalogue.sqlite").exists():
            missing += 1
            assert made.try_start() == 6, call
            assert "catalogue" in made.refusal
        document = made.vtpm_manager("rebuild-catalogue", "--json").json
        assert (document["names_kept"], document["names_made"]) == (3, 0), call
    assert missing >= 2
    made.start()
    assert {row["name"] for row in made.command("vtpm-list", "--json").json} == {"one", "two", "three"}


def test_what_a_lost_catalogue_left_does_not_get_into_the_new_one(killed: tuple[Installation, Path]) -> None:
    made, copy = killed
    if made.manager is not None:
        made.stop()
    shutil.rmtree(made.state)
    shutil.copytree(copy, made.state)
    (made.state / "catalogue.sqlite").unlink()
    assert (made.state / "catalogue.sqlite-wal").exists()
    document = made.vtpm_manager("rebuild-catalogue", "--json").json
    assert (document["names_made"], document["old"]) == (3, None)
    made.start()
    rows = made.command("vtpm-list", "--json").json
    assert all(row["name"] == f"vtpm-{row['uuid']}" for row in rows)
    assert {row["verdict"] for row in made.command("vtpm", "verify", "--all", "--json").json} == {"ok"}

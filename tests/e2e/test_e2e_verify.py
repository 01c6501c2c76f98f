"""vtpm-verify: what is whole is found whole, each kind of harm is named, and not a byte changes."""

import hashlib
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import vtpm_instance_rig as tpm
from e2e_rig import Guest, Installation, installation

pytestmark = pytest.mark.e2e
INDEX = 0x1500016


def hashes(state: Path) -> dict[str, str]:
    """Every file but the TPM's own, which counts its starts."""
    files = [path for path in state.rglob("*") if path.is_file() and "embedded-tpm" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def sql(state: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(state / "catalogue.sqlite") as connection:
        connection.execute(statement, values)
    connection.close()


class Copy:
    """A stopped installation of one used vTPM `web`, one never started `idle`, and an attached `busy`."""

    def __init__(self, made: Installation, uuids: dict[str, str]) -> None:
        self.made, self.uuids, self.state = made, uuids, made.state

    def image(self, name: str) -> Path:
        return self.state / "state" / f"{self.uuids[name]}.img"

    def verify(self, code: int, *words: str) -> list[dict[str, Any]]:
        before = hashes(self.state)
        done = self.made.command("vtpm", "verify", "--state-dir", str(self.state), *words, "--json", check=False)
        assert done.code == code, (done.out, done.err)
        assert hashes(self.state) == before, "verification changes nothing"
        return done.json if isinstance(done.json, list) else []

    def wrong(self) -> list[tuple[str, str, str | None]]:
        rows = self.verify(6, "--all")
        return [(row["what"], row["verdict"], row["name"]) for row in rows if row["verdict"] != "ok"]


@pytest.fixture(scope="module")
def stopped() -> Iterator[tuple[Installation, dict[str, str]]]:
    with installation() as made:
        made.init()
        made.start()
        uuids = {name: made.add(name) for name in ("web", "idle", "busy")}
        for name in ("web", "busy"):
            guest = Guest(made.attach(name)["endpoint"])
            guest.define(INDEX, 8)
            guest.write(INDEX, b"precious")
            guest.close()
        made.command("vtpm-detach", "web")
        assert made.stop() == 0
        yield made, uuids


@pytest.fixture
def copy(stopped: tuple[Installation, dict[str, str]], tmp_path: Path) -> Iterator[Copy]:
    with installation() as made:
        shutil.copytree(stopped[0].state, made.state, ignore=shutil.ignore_patterns("*.sock", "*.sock.ctrl"))
        yield Copy(made, stopped[1])


def test_what_is_whole_is_found_whole(copy: Copy) -> None:
    rows = copy.verify(0)
    assert {row["verdict"] for row in rows} == {"ok"}
    assert {(row["what"], row["name"]) for row in rows} >= {
        ("store", None),
        ("catalogue", None),
        ("group", "default"),
        ("state image", "web"),
        ("state image", "idle"),
        ("state image", "busy"),
    }
    (one,) = copy.verify(0, copy.uuids["web"])
    assert one["vtpm"] == copy.uuids["web"]
    assert "decrypted" in one["text"]


def test_a_flipped_byte_of_the_live_slot_is_damage_of_that_vtpm_only(copy: Copy) -> None:
    for slot in (0, 1):
        flip(copy.image("web"), 4096 + slot * 16384 + 200)
    assert copy.wrong() == [("state image", "damaged", "web")]
    copy.verify(0, "busy")
    copy.verify(6, "web")


def test_a_missing_image_and_one_of_another_vtpm_are_told_apart(copy: Copy) -> None:
    shutil.copyfile(copy.image("web"), copy.image("busy"))
    copy.image("web").unlink()
    assert sorted(copy.wrong()) == [("state image", "foreign", "busy"), ("state image", "missing", "web")]


def test_an_image_without_a_record_and_a_file_that_is_none_are_found(copy: Copy) -> None:
    shutil.copyfile(copy.image("web"), copy.state / "state" / f"{uuid4()}.img")
    (copy.state / "state" / "what.img").write_bytes(b"?")
    assert copy.wrong() == [("state image", "disagrees", None)] * 2


def test_an_edited_row_is_found_and_the_others_are_still_checked(copy: Copy) -> None:
    sql(copy.state, "update vtpms set name = 'evil' where name = 'web'")
    rows = copy.verify(6)
    wrong = [(row["what"], row["verdict"], row["vtpm"]) for row in rows if row["verdict"] != "ok"]
    assert wrong == [("catalogue", "damaged", None), ("record", "disagrees", copy.uuids["web"])]
    assert any(row["name"] == "busy" and row["verdict"] == "ok" for row in rows)


def test_a_record_without_a_name_and_an_attachment_without_a_vtpm_are_found(copy: Copy) -> None:
    sql(copy.state, "delete from vtpms where name in ('idle', 'busy')")
    assert sorted(copy.wrong(), key=str) == [
        ("catalogue", "disagrees", None),
        ("record", "disagrees", None),
        ("record", "disagrees", None),
    ]


def test_a_missing_and_a_broken_catalogue_are_found(copy: Copy) -> None:
    (copy.state / "catalogue.sqlite").write_bytes(b"no database" * 1000)
    assert ("catalogue", "damaged", None) in copy.wrong()
    (copy.state / "catalogue.sqlite").unlink()
    assert ("catalogue", "missing", None) in copy.wrong()


def test_a_store_that_does_not_open_is_found(copy: Copy) -> None:
    store = copy.state / "store.img"
    content = store.read_bytes()
    flip(store, 3 * 4096 + 100)
    flip(store, 5 * 4096 + 100)
    assert copy.wrong() == [("store", "damaged", None)]
    store.write_bytes(content[:100_000])
    assert copy.wrong() == [("store", "damaged", None)]


def test_an_older_store_disagrees_with_the_anchors(copy: Copy) -> None:
    older = (copy.state / "store.img").read_bytes()
    copy.made.start()
    copy.made.add("new")
    assert copy.made.stop() == 0
    (copy.state / "store.img").write_bytes(older)
    assert copy.wrong() == [("store", "disagrees", None)]


def test_an_image_of_another_time_disagrees_with_its_record(copy: Copy) -> None:
    older = copy.image("web").read_bytes()
    copy.made.start()
    guest = Guest(copy.made.attach("web")["endpoint"])
    for turn in range(4):
        guest.write(INDEX, bytes([turn]) * 8)
    guest.close()
    copy.made.command("vtpm-detach", "web")
    assert copy.made.stop() == 0
    copy.image("web").write_bytes(older)
    assert copy.wrong() == [("state image", "disagrees", "web")]


def test_a_vtpm_that_saves_all_the_time_is_verified_meanwhile(copy: Copy) -> None:
    copy.made.start()
    guest = Guest(copy.made.show("busy")["endpoint"])
    stop = threading.Event()

    def save() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            guest.write(INDEX, turn.to_bytes(8))

    saver = threading.Thread(target=save)
    saver.start()
    try:
        for _ in range(5):
            rows = copy.made.command("vtpm", "verify", "--all", "--json", check=False).json
            assert {row["verdict"] for row in rows} <= {"ok", "unchecked"}, rows
    finally:
        stop.set()
        saver.join()
        guest.close()


def test_online_it_names_what_is_wrong_and_nothing_stops(copy: Copy) -> None:
    copy.made.start()
    for slot in (0, 1):
        flip(copy.image("web"), 4096 + slot * 16384 + 200)
    done = copy.made.command("vtpm", "verify", "--all", check=False)
    assert done.code == 6
    assert "damaged" in done.out
    assert "checks: " in done.out
    lines = copy.made.command("vtpm", "verify", "--all", "--jsonl", check=False)
    assert lines.code == 6
    assert len(lines.out.splitlines()) >= 6
    assert copy.made.command("vtpm", "verify", "web", "--quiet", check=False).out == ""
    guest = Guest(copy.made.show("busy")["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    assert guest.code(tpm.get_random(8)) == 0
    guest.close()


def test_online_a_damaged_sector_of_the_store_is_found_in_the_image(copy: Copy) -> None:
    copy.made.start()
    flip(copy.state / "store.img", 500)
    rows = copy.made.command("vtpm", "verify", "--all", "--json", check=False).json
    assert [row["verdict"] for row in rows if row["what"] == "store"] == ["damaged"]
    flip(copy.state / "store.img", 500)
    assert copy.made.command("vtpm", "verify", "--all", check=False).code == 0


def test_wrong_words_and_a_running_manager_are_refused(copy: Copy) -> None:
    assert copy.made.command("vtpm", "verify", "--state-dir", "/nowhere", check=False).code == 2
    both = ("vtpm", "verify", "web", "--all", "--state-dir", str(copy.state))
    assert copy.made.command(*both, check=False).code == 2
    copy.verify(3, "nobody")
    copy.made.start()
    assert copy.made.command("vtpm", "verify", check=False).code == 2
    assert copy.made.command("vtpm", "verify", "web", "--all", check=False).code == 2
    assert copy.made.command("vtpm", "verify", str(UUID(int=7)), check=False).code == 3
    busy = copy.made.command("vtpm", "verify", "--state-dir", str(copy.state), check=False)
    assert (busy.code, busy.out) == (8, "")

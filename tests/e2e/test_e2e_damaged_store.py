"""A damaged sector of the store under the real manager: what is in it fails closed, everything else goes on."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from e2e_rig import Guest, Installation, wait_for

from manager.anchor import clean_stop
from manager.config import Config, Layout
from manager.opening import locked_store, open_store, open_tpm
from storage import store_format as fmt

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
INDEX = 0x1500016
USED = ("first", "second", "third")


def leaves_of(made: Installation) -> dict[int, set[str]]:
    """Which vTPMs (UUIDs) are in which sector of a stopped installation's store, whose log this empties first."""
    layout = Layout(made.state, made.runtime)
    config = Config.load(layout.config)
    with locked_store(layout) as descriptor, open_tpm(layout, config) as tpm:
        opened = open_store(descriptor, tpm, config)
        opened.store.checkpoint()
        tpm.anchor_write(opened.boot.anchor, opened.secret.anchor_auth, clean_stop(opened.store.digest()))
        state = opened.store._state
        found: dict[int, set[str]] = {}
        for record in opened.store.vtpms():
            table = state.groups[record.group].table
            assert table is not None
            entry = table._index[record.uuid.bytes] // fmt.ROWS_PER_LEAF
            ref = state.tree.entries[entry]
            assert ref is not None
            found.setdefault(ref.location, set()).add(str(record.uuid))
        return found


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def use(made: Installation, name: str) -> None:
    guest = Guest(made.attach(name, f"guest-{name}")["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, b"precious")
    guest.close()


@pytest.fixture
def filled(vtpms: Installation) -> tuple[Installation, dict[str, str]]:
    """An installation with three used, attached vTPMs in three leaves, and a hundred more around them; stopped."""
    uuids = {}
    for number, name in enumerate(USED):
        uuids[name] = vtpms.add(name)
        vtpms.command("vtpm-add", "--count", "50", "--name", f"filler-{number}-{{}}")
    for name in USED:
        use(vtpms, name)
    assert vtpms.stop() == 0
    return vtpms, uuids


def wrong(made: Installation, *words: str) -> list[dict[str, Any]]:
    done = made.command("vtpm", "verify", *words, "--json", check=False)
    assert done.code == 6, (done.out, done.err)
    return [row for row in done.json if row["verdict"] not in ("ok", "unchecked")]


def test_a_damaged_leaf_costs_its_own_vtpms_and_nobody_else(filled: tuple[Installation, dict[str, str]]) -> None:
    made, uuids = filled
    leaves = leaves_of(made)
    location = next(place for place, vtpms in leaves.items() if uuids["first"] in vtpms)
    lost = leaves[location]
    safe = [name for name in USED if uuids[name] not in lost]
    assert len(safe) == 2
    flip(made.state / "store.img", location * fmt.SECTOR + 1234)
    offline = wrong(made, "--state-dir", str(made.state))
    assert {row["vtpm"] for row in offline if row["vtpm"]} == lost
    assert next(row["name"] for row in offline if row["vtpm"] == uuids["first"]) == "first"
    made.start()
    for name in safe:
        wait_for(lambda name=name: made.show(name)["state"] == "running", f"{name} to run")
        guest = Guest(made.show(name)["endpoint"])
        assert guest.read(INDEX, 8) == b"precious"
        guest.write(INDEX, b"new data")
        guest.close()
    online = wrong(made, "--all")
    assert {row["vtpm"] for row in online if row["vtpm"]} == lost
    assert any(row["what"] == "store" and "leaf" in row["text"] for row in online)
    assert made.command("vtpm", "verify", "first", check=False).code == 6
    assert made.show("first")["pid"] is None, "what cannot be read is not started as something new"
    made.command("vtpm-detach", "first")
    for words in (
        ("vtpm-attach", "first", "guest"),
        ("vtpm-reset", "first", "--yes"),
        ("vtpm-remove", "first", "--yes"),
    ):
        answer = made.command(*words, check=False)
        assert (answer.code, "damaged" in answer.err) == (6, True), (words, answer.code, answer.err)
    answer = made.command("vtpm-add", "--name", "same", "--uuid", str(uuid4()), check=False)
    assert answer.code == 6, "a UUID that somebody chose may have been in the damaged sector"
    made.command("vtpm-add", "--name", "later")
    use(made, "later")
    assert made.stop() == 0
    flip(made.state / "store.img", location * fmt.SECTOR + 1234)
    made.start()
    guest = Guest(made.attach("first", "guest-first")["endpoint"])
    assert guest.read(INDEX, 8) == b"precious", "what was lost is whole again"
    guest.close()
    assert {row["verdict"] for row in made.command("vtpm", "verify", "--all", "--json").json} == {"ok"}

"""A catalogue made anew from the store: what is kept, what is made up, what is lost."""

import sqlite3

import pytest
from e2e_rig import Guest, Installation

pytestmark = pytest.mark.e2e
INDEX = 0x1500016


def test_a_lost_catalogue_is_made_anew_from_the_store(vtpms: Installation) -> None:
    vtpms.add("web")
    guest = Guest(vtpms.attach("web")["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, b"precious")
    guest.close()
    uuid = vtpms.show("web")["uuid"]
    old = vtpms.add("old", "--tpm", "1.2")
    assert vtpms.vtpm_manager("rebuild-catalogue", check=False).code == 8
    assert vtpms.stop() == 0
    for path in vtpms.state.glob("catalogue.sqlite*"):
        path.unlink()
    done = vtpms.vtpm_manager("rebuild-catalogue", "--json").json
    assert (done["groups"], done["names_kept"], done["names_made"]) == (1, 0, 2)
    assert (done["attachments_lost"], done["old"]) == (None, None)
    vtpms.start()
    assert vtpms.show(f"vtpm-{uuid}")["state"] == "detached"
    assert vtpms.show(old)["tpm"] == "1.2"
    guest = Guest(vtpms.attach(uuid)["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    guest.close()
    assert {row["verdict"] for row in vtpms.command("vtpm", "verify", "--all", "--json").json} == {"ok"}


def test_authentic_names_are_kept_and_edited_ones_are_not(vtpms: Installation) -> None:
    uuids = {name: vtpms.add(name) for name in ("one", "two", "three")}
    vtpms.command("vtpm-label", "two", "env=prod")
    vtpms.attach("three")
    vtpms.command("vtpm-detach", "three")
    vtpms.attach("two")
    assert vtpms.stop() == 0
    with sqlite3.connect(vtpms.state / "catalogue.sqlite") as connection:
        connection.execute("update vtpms set name = 'evil' where name = 'one'")
    connection.close()
    assert vtpms.try_start() == 6
    before = (vtpms.state / "catalogue.sqlite").read_bytes()
    answer = vtpms.vtpm_manager("rebuild-catalogue")
    assert "2 names kept, 1 made from UUIDs" in answer.out
    assert "1 attachments kept" in answer.out
    assert "labels are lost" in answer.out
    assert (vtpms.state / "catalogue.sqlite.old-1").read_bytes() == before
    vtpms.start()
    rows = {row["name"]: row for row in vtpms.command("vtpm-list", "--json").json}
    assert rows.keys() == {"two", "three", f"vtpm-{uuids['one']}"}
    assert (rows["two"]["guest"], rows["two"]["labels"]) == ("guest", None), "the store vouches for its attachment"
    vtpms.stop()
    vtpms.vtpm_manager("rebuild-catalogue")
    assert (vtpms.state / "catalogue.sqlite.old-2").exists()

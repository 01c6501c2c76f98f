"""A manager whose catalogue is on PostgreSQL, from init to restore, through restarts of either side."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_rig import Guest, Installation, installation
from postgresql_rig import Server, name_of, server

pytestmark = pytest.mark.e2e
INDEX = 0x1500016
PASSWORD = "hunter2-secret"  # the server trusts everybody; what counts is where it turns up


@pytest.fixture(scope="module")
def database() -> Iterator[Server]:
    with server() as running:
        yield running


def states(made: Installation) -> dict[str, str]:
    return {row["name"]: row["state"] for row in made.command("vtpm-list", "--json").json}


def assert_whole(made: Installation) -> None:
    rows = made.command("vtpm", "verify", "--all", "--json").json
    assert {row["verdict"] for row in rows} == {"ok"}


def test_a_life_on_postgresql(bare: Installation, database: Server, tmp_path: Path) -> None:
    url = database.url(name_of(database.new_database()), PASSWORD)
    bare.init("--catalogue", url)
    assert not (bare.state / "catalogue.sqlite").exists()
    assert bare.vtpm_manager("check", "--allow-weak").code == 0
    bare.start()
    bare.add("web", "--label", "env=prod")
    bare.command("vtpm-add", "--count", "20", "--name", "many-{:02}", "--label", "tier=db")
    guest = Guest(bare.attach("web", "guest-1")["endpoint"])
    guest.define(INDEX, 8)
    guest.write(INDEX, b"precious")
    guest.close()
    status = bare.vtpm_manager("status", "--json")
    assert status.json["vtpms"] == 21
    assert status.json["catalogue"].startswith("postgresql+psycopg://postgres@/")
    bare.restart()
    assert states(bare)["web"] == "running"
    assert_whole(bare)
    assert len(bare.command("vtpm-list", "--label", "tier=db", "--quiet").out.split()) == 20
    bare.vtpm_manager("backup", str(tmp_path / "b.tar"))
    assert bare.stop() == 0
    offline = bare.command("vtpm", "verify", "--state-dir", str(bare.state), "--all", "--json")
    assert {row["verdict"] for row in offline.json} == {"ok"}
    for text in (status.out, bare.log.read_text(), (tmp_path / "b.tar").read_bytes().decode("latin-1"), offline.out):
        assert PASSWORD not in text
    assert PASSWORD in (bare.state / "config.toml").read_text()

    database.execute(name_of(url), "update vtpm_manager.attachments set guest = 'thief'")
    assert bare.try_start() == 6
    assert "attachment" in bare.refusal
    again = bare.vtpm_manager("rebuild-catalogue", "--json").json
    assert (again["names_kept"], again["attachments_kept"], again["attachments_lost"]) == (21, 0, 0)
    assert "vtpm_manager_old_1" in again["old"]
    bare.start()
    assert states(bare)["web"] == "detached"
    bare.attach("web", "guest-2")
    guest = Guest(bare.show("web")["endpoint"])
    assert guest.read(INDEX, 8) == b"precious"
    guest.close()
    assert_whole(bare)


def test_a_backup_goes_from_a_file_to_postgresql_and_back(
    vtpms: Installation, database: Server, tmp_path: Path
) -> None:
    vtpms.add("web", "--label", "env=prod")
    vtpms.attach("web", "guest-1")
    vtpms.vtpm_manager("backup", str(tmp_path / "b.tar"))
    url = database.new_database()
    with installation() as other:
        other.vtpm_manager("restore", str(tmp_path / "b.tar"), "--catalogue", url)
        assert not (other.state / "catalogue.sqlite").exists()
        other.vtpm_manager("recover", "--key", str(vtpms.recovery))
        other.start()
        shown = other.show("web")
        assert (shown["guest"], shown["labels"]) == ("guest-1", "env=prod")
        assert_whole(other)
        other.command("vtpm-label", "web", "env=test")
        other.vtpm_manager("backup", str(tmp_path / "c.tar"))
    with installation() as third:
        refused = third.vtpm_manager("restore", str(tmp_path / "c.tar"), check=False)
        assert refused.code == 4, "the database of the configuration is not empty"
        assert "name an empty database" in refused.err
        assert not third.state.exists()
        third.vtpm_manager("restore", str(tmp_path / "c.tar"), "--catalogue", "file")
        third.vtpm_manager("recover", "--key", str(vtpms.recovery))
        third.start()
        assert third.show("web")["labels"] == "env=test"


def test_a_server_that_goes_away_costs_verbs_not_vtpms(bare: Installation) -> None:
    with server() as database:
        bare.init("--catalogue", database.new_database())
        bare.start()
        bare.add("web")
        guest = Guest(bare.attach("web")["endpoint"])
        guest.define(INDEX, 8)
        database.stop()
        refused = bare.command("vtpm-add", "--name", "other", check=False)
        assert refused.code == 1
        assert "does not answer" in refused.err
        assert bare.command("vtpm-list", check=False).code == 1
        guest.write(INDEX, b"precious")
        assert guest.read(INDEX, 8) == b"precious", "a guest's saves need no catalogue"
        database.start()
        assert list(states(bare)) == ["web"]
        bare.add("other")
        assert_whole(bare)
        guest.close()
        database.kill()
        assert bare.stop() == 0, "a clean stop needs no catalogue"
        assert bare.try_start() == 1
        assert "does not answer" in bare.refusal
        database.start()
        bare.start()
        assert states(bare) == {"web": "running", "other": "added"}


def test_wrong_databases_are_refused(bare: Installation, database: Server) -> None:
    for url, code in (("mysql://x/y", 2), ("hunter2-secret", 2), (database.url("nowhere"), 1)):
        refused = bare.init("--catalogue", url, check=False)
        assert refused.code == code, refused.err
        assert "hunter2" not in refused.err
        assert not (bare.state / "store.img").exists()
    url = database.new_database()
    bare.init("--catalogue", url)
    with installation() as other:
        refused = other.init("--catalogue", url, check=False)
        assert refused.code == 4
        assert "empty database" in refused.err
    bare.start()
    with installation() as second:
        second.init("--catalogue", database.new_database())
        text = (second.state / "config.toml").read_text()
        lines = [f'url = "{url}"' if line.startswith("url = ") else line for line in text.splitlines()]
        (second.state / "config.toml").write_text("\n".join(lines) + "\n")
        assert second.try_start() == 8, "another manager has it"
        assert bare.stop() == 0
        assert second.try_start() == 6, "it belongs to another store"
        assert "belongs to store" in second.refusal


def test_an_init_that_was_cut_short_takes_its_catalogue_out_of_the_database(
    bare: Installation, database: Server
) -> None:
    url = database.new_database()
    os.makedirs(bare.state / "config.new")  # the configuration is written after the catalogue, and cannot be now
    assert bare.init("--catalogue", url, check=False).code == 1
    (bare.state / "config.new").rmdir()
    bare.init("--catalogue", url)
    bare.start()

"""A catalogue that an older version wrote is brought up to date with every row, or left as it was."""

import gzip
import hmac
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from postgresql_rig import Server, server

from storage import catalogue_schema as schema
from storage.catalogue import AttachmentRow, Catalogue, VtpmRow
from storage.catalogue_copy import make_schema
from storage.catalogue_database import Database
from storage.catalogue_migrate import MIGRATIONS, alembic_config
from storage.errors import CatalogueDamaged, CatalogueError, CatalogueTooOld, RowTampered

VECTORS = Path(__file__).parent / "vectors"
WANTED: dict[str, Any] = json.loads((VECTORS / "catalogue-schema-1.json").read_text(encoding="utf-8"))
KEY = bytes.fromhex(WANTED["key"])
STORE = UUID(int=7)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Server]:
    with server() as running:
        yield running


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A file of schema 1, made by the version that had it."""
    path = tmp_path / "catalogue.sqlite"
    path.write_bytes(gzip.decompress((VECTORS / "catalogue-schema-1.sqlite.gz").read_bytes()))
    path.chmod(0o600)
    return path


def as_text(row: VtpmRow | AttachmentRow) -> dict[str, Any]:
    names = WANTED["vtpms" if isinstance(row, VtpmRow) else "attachments"][0]
    values = {name: getattr(row, name) for name in names}
    return {name: value if isinstance(value, int) else str(value) for name, value in values.items()}


def assert_whole(catalogue: Catalogue) -> None:
    audit = catalogue.audit()
    assert not audit.tampered
    assert sorted(map(as_text, audit.vtpms), key=str) == sorted(WANTED["vtpms"], key=str)
    assert sorted(map(as_text, audit.attachments), key=str) == sorted(WANTED["attachments"], key=str)
    assert {row.epoch for row in audit.attachments} == {0}
    assert {str(row.uuid): row.name for row in catalogue.groups()} == WANTED["groups"]
    events = [[row.kind, str(row.vtpm) if row.vtpm else None, row.text] for row in catalogue.events()]
    assert events == WANTED["events"]


def dump(path: Path) -> list[str]:
    """A file's content, whatever its pages look like."""
    with closing(sqlite3.connect(path)) as database:
        return list(database.iterdump())


def differences(database: Database) -> list[Any]:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, schema.metadata))


def test_schema_1_is_adopted_with_every_row_and_its_mac(old: Path) -> None:
    before = dump(old)
    with Catalogue.open(old, KEY, STORE) as catalogue:
        assert_whole(catalogue)
        catalogue.take_possession(STORE)
        assert differences(catalogue._database) == []
    copy = old.with_name("catalogue.sqlite.schema-1")
    assert copy.stat().st_mode & 0o777 == 0o600
    assert dump(copy) == before
    with Catalogue.open(old, KEY, STORE) as again:
        assert_whole(again)
    assert not old.with_name("catalogue.sqlite.schema-1.2").exists(), "migrated once"


def test_schema_2_is_adopted_with_the_rows_and_macs_that_it_wrote(old: Path) -> None:
    """Its attachments had an epoch in their MAC, and knew neither quotas nor a time to hibernate."""
    database = Database(old)
    with database.define() as connection:
        config = alembic_config(connection)
        command.stamp(config, "0001")
        command.upgrade(config, "0002")
        row = dict(connection.execute(sa.text("select * from attachments")).mappings().first() or {})
        row["epoch"] = 77
        said = {name: value for name, value in row.items() if name != "mac"} | {"vtpm": str(UUID(row["vtpm"]))}
        text = json.dumps(["attachments", said], separators=(",", ":"), sort_keys=True)
        mac = hmac.digest(KEY, text.encode(), "sha256")
        changed = sa.text("update attachments set epoch = 77, mac = :mac where vtpm = :vtpm")
        connection.execute(changed, {"mac": mac, "vtpm": row["vtpm"]})
    database.close()
    with Catalogue.open(old, KEY, STORE) as catalogue:
        found = catalogue.find_attachment(UUID(row["vtpm"]))
        assert found is not None
        assert (found.epoch, found.guest, found.hibernate_after) == (77, row["guest"], None)
        assert (found.commands_per_second, found.saves_per_second, found.nv_bytes) == (0, 0, 0)
        assert not catalogue.audit().tampered
        assert differences(catalogue._database) == []
    assert old.with_name("catalogue.sqlite.schema-2").exists()


def test_schema_5_is_adopted_with_the_rows_and_macs_that_it_wrote(old: Path) -> None:
    """Its attachments had quotas and ports in their MACs, and knew no domains."""
    database = Database(old)
    with database.define() as connection:
        config = alembic_config(connection)
        command.stamp(config, "0001")
        command.upgrade(config, "0005")
        row = dict(connection.execute(sa.text("select * from attachments")).mappings().first() or {})
        row |= {"epoch": 77, "tcp_port": 2321, "saves_per_second": 5}
        said = {name: value for name, value in row.items() if name != "mac" and value not in (0, None, "")}
        said |= {"vtpm": str(UUID(row["vtpm"]))}
        mac = hmac.digest(
            KEY, json.dumps(["attachments", said], separators=(",", ":"), sort_keys=True).encode(), "sha256"
        )
        changed = sa.text("update attachments set epoch = 77, tcp_port = 2321, saves_per_second = 5, mac = :mac")
        connection.execute(changed, {"mac": mac})
        connection.execute(sa.text("delete from attachments where vtpm <> :vtpm"), {"vtpm": row["vtpm"]})
    database.close()
    with Catalogue.open(old, KEY, STORE) as catalogue:
        found = catalogue.find_attachment(UUID(row["vtpm"]))
        assert found is not None
        assert (found.epoch, found.tcp_port, found.guest) == (77, 2321, row["guest"])
        assert (found.domain, found.localities, found.bound_domain, found.ran_before) == ("", 1, None, None)
        assert (found.compat, found.maintenance) == (False, False)
        assert not catalogue.audit().tampered
        assert differences(catalogue._database) == []
        catalogue.renew(replace(found, bound_domain=3, ran_before=False, startup="deactivated"))
        assert not catalogue.audit().tampered
    assert old.with_name("catalogue.sqlite.schema-5").exists()


def test_a_row_that_was_edited_before_the_migration_is_refused_after_it(old: Path) -> None:
    with closing(sqlite3.connect(old)) as database, database:
        database.execute("update attachments set guest = 'thief'")
    with pytest.raises(RowTampered, match="thief"):
        Catalogue.open(old, KEY, STORE)


def test_whoever_may_not_change_it_leaves_an_older_one_alone(old: Path) -> None:
    before = old.read_bytes()
    with pytest.raises(CatalogueTooOld):
        Catalogue.open(old, KEY, STORE, change=False)
    assert old.read_bytes() == before
    assert not list(old.parent.glob("*.schema-1"))


def test_a_migration_that_fails_leaves_what_was_there(old: Path) -> None:
    with closing(sqlite3.connect(old)) as database, database:
        database.execute("create table labels (surprise)")  # the migration makes this table, after altering others
    before = dump(old)
    with pytest.raises(CatalogueDamaged):
        Catalogue.open(old, KEY, STORE)
    assert dump(old) == before


def test_schema_1_on_postgresql_is_migrated_too(postgresql: Server, old: Path) -> None:
    url = postgresql.new_database()
    database = Database(url)
    with database.define() as connection:
        make_schema(connection)
        command.upgrade(alembic_config(connection), "0001")
        with closing(sqlite3.connect(old)) as source:
            source.row_factory = sqlite3.Row
            for table in ("groups", "vtpms", "attachments", "events"):
                rows = [dict(row) for row in source.execute(f"select * from {table} order by rowid")]
                for row in rows:
                    row.pop("id", None)
                columns = ", ".join(f'"{name}"' for name in rows[0])
                values = ", ".join(
                    f"cast(:{n} as uuid)" if n in ("uuid", "group", "vtpm") else f":{n}" for n in rows[0]
                )
                connection.execute(sa.text(f"insert into {table} ({columns}) values ({values})"), rows)
    assert differences(database), "the comparison sees a difference"
    database.close()
    with Catalogue.open(url, KEY, STORE) as catalogue:
        assert_whole(catalogue)
        assert differences(catalogue._database) == []


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_new_catalogue_has_the_schema_that_migrations_lead_to(kind: str, postgresql: Server, tmp_path: Path) -> None:
    place = tmp_path / "new.sqlite" if kind == "sqlite" else postgresql.new_database()
    with Catalogue.create(place, KEY, STORE) as catalogue:
        assert differences(catalogue._database) == []
        with catalogue._database.read() as connection:
            head = MigrationContext.configure(connection).get_current_revision()
    assert head == ScriptDirectory(str(MIGRATIONS)).get_current_head() == schema.revision_of(schema.SCHEMA)
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    target = Database(empty if kind == "sqlite" else postgresql.new_database())
    with target.define() as connection:
        if kind == "postgresql":
            make_schema(connection)
        command.upgrade(alembic_config(connection), "head")
    assert differences(target) == []
    target.close()


def test_a_catalogue_of_schema_1_is_loaded_into_postgresql(postgresql: Server, old: Path, tmp_path: Path) -> None:
    url = postgresql.new_database()
    snapshot = tmp_path / "backup" / "catalogue.sqlite"
    snapshot.parent.mkdir()
    shutil.copyfile(old, snapshot)
    Catalogue.load(url, snapshot)
    with Catalogue.open(url, KEY, STORE) as catalogue:
        assert_whole(catalogue)


def test_the_scripts_are_shipped() -> None:
    import tomllib

    project = tomllib.loads((MIGRATIONS.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["setuptools"]["packages"]
    assert {"storage.migrations", "storage.migrations.versions"} <= set(packages)
    scripts = list((MIGRATIONS / "versions").glob("v*.py"))
    assert len(scripts) == schema.SCHEMA
    with pytest.raises(CatalogueError):
        Catalogue.open(Path("/nowhere/catalogue.sqlite"), KEY)


def test_rows_of_schema_2_keep_their_macs(old: Path) -> None:
    database = Database(old)
    with database.define() as connection:
        config = alembic_config(connection)
        command.stamp(config, "0001")
        command.upgrade(config, "0002")
    row: dict[str, Any] = {
        "vtpm": UUID(int=99),
        "guest": "guest",
        "frontend": "socket",
        "owner": "0:0",
        "mode": "0660",
        "startup": "clear",
        "lease": 5,
        "created": "2026-11-20T12:00:02+00:00",
        "epoch": 3,
    }
    # as schema 2 wrote it: its MAC is over these fields and no others
    fields = ",".join(f'"{name}":{json.dumps(value, default=str)}' for name, value in sorted(row.items()))
    mac = hmac.digest(KEY, f'["attachments",{{{fields}}}]'.encode(), "sha256")
    names = ", ".join(row)
    with database.change() as connection:
        insert = f"insert into attachments ({names}, mac) values ({', '.join(':' + name for name in row)}, :mac)"
        connection.execute(sa.text(insert), row | {"vtpm": row["vtpm"].hex, "mac": mac})
    database.close()
    with Catalogue.open(old, KEY, STORE) as catalogue:
        found = catalogue.find_attachment(UUID(int=99))
        assert found == AttachmentRow(**row)
        assert (found.hw_pcrs, found.tcp_port) == ("", 0)
        catalogue.renew(replace(found, hw_pcrs="0,7", tcp_port=2321))
        again = catalogue.find_attachment(UUID(int=99))
        assert again is not None
        assert (again.hw_pcrs, again.tcp_port) == ("0,7", 2321)
    for column, value in (("hw_pcrs", "0"), ("tcp_port", 2323)):
        with closing(sqlite3.connect(old)) as edited, edited:
            (before,) = edited.execute(f"select {column} from attachments where guest = 'guest'").fetchone()
            edited.execute(f"update attachments set {column} = ? where guest = 'guest'", (value,))
        with pytest.raises(RowTampered, match="guest"):
            Catalogue.open(old, KEY, STORE)
        with closing(sqlite3.connect(old)) as edited, edited:
            edited.execute(f"update attachments set {column} = ? where guest = 'guest'", (before,))
    Catalogue.open(old, KEY, STORE).close()

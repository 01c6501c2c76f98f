"""Brings a catalogue of an older schema up to date: a copy of the file first, then Alembic, in one transaction."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from storage.catalogue_database import Database
from storage.catalogue_schema import revision_of

MIGRATIONS: Final = Path(__file__).parent / "migrations"


def alembic_config(connection: sa.Connection) -> Config:
    """Return what Alembic's commands need to work on an open connection."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def migrate(database: Database, version: int) -> None:
    """Migrate from schema `version` to the newest; a failure leaves what was there.

    Raises:
        CatalogueDamaged: its tables are not those of that schema, or the copy cannot be made.

    """
    if isinstance(database.place, Path):
        with database.told():
            _keep_copy(database.place, version)
    with database.define() as connection:
        config = alembic_config(connection)
        if not sa.inspect(connection).has_table("alembic_version"):
            command.stamp(config, revision_of(version))
        command.upgrade(config, "head")


def _keep_copy(path: Path, version: int) -> Path:
    """Copy the file, what lies in its write-ahead log included, to a name beside it that is free."""
    stem = f"{path.name}.schema-{version}"
    names = (path.with_name(stem if number == 1 else f"{stem}.{number}") for number in range(1, 1_000_000))
    copy = next(name for name in names if not name.exists())
    copy.touch(mode=0o600, exist_ok=False)
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    return copy

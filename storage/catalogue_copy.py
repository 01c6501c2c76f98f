"""A catalogue's rows from one database into another: snapshots are SQLite files, whatever the catalogue lies in."""

import sqlite3
from contextlib import closing
from typing import Final

import sqlalchemy as sa

from storage import catalogue_schema as schema
from storage.catalogue_database import POSTGRESQL_SCHEMA, Database

_AT_ONCE: Final = 1000  # rows in memory


def snapshot_of(database: Database) -> bytes:
    """Return the bytes of a SQLite file with everything that is in the catalogue now."""
    if database.is_file:
        with database.read() as connection, closing(sqlite3.connect(":memory:")) as copy:
            driver = connection.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection), "a file is opened by SQLite"
            driver.backup(copy)
            return copy.serialize()
    engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
    try:
        with database.stream() as source, engine.connect() as target:
            schema.make_tables(target)
            _copy_rows(source, target)
            target.commit()
            driver = target.connection.driver_connection
            assert isinstance(driver, sqlite3.Connection), "made just now"
            return driver.serialize()
    finally:
        engine.dispose()


def fill_from_file(database: Database, source: Database) -> None:
    """Make the tables on PostgreSQL and copy every row of the SQLite file `source`, in one transaction."""
    with source.stream() as rows, database.define() as connection:
        make_schema(connection)
        schema.make_tables(connection)
        _copy_rows(rows, connection)


def make_schema(connection: sa.Connection) -> None:
    """Make our schema in a PostgreSQL database."""
    connection.execute(sa.schema.CreateSchema(POSTGRESQL_SCHEMA))


def _copy_rows(source: sa.Connection, target: sa.Connection) -> None:
    for table in schema.metadata.sorted_tables:
        # PostgreSQL numbers events itself; the order is what counts
        columns = [column for column in table.c if not (table is schema.events and column.name == "id")]
        query = sa.select(*columns)
        if table is schema.events:
            query = query.order_by(schema.events.c.id)
        with source.execute(query) as result:
            for rows in result.mappings().partitions(_AT_ONCE):
                target.execute(table.insert(), [dict(row) for row in rows])


def drop_tables(database: Database) -> None:
    """Take the catalogue on PostgreSQL away."""
    with database.change() as connection:
        connection.execute(sa.schema.DropSchema(POSTGRESQL_SCHEMA, cascade=True, if_exists=True))


def vacuum(database: Database) -> None:
    """Give the room of removed rows back; on PostgreSQL others change the catalogue meanwhile."""
    if database.is_file:
        with database.told(), database.writer.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("vacuum")
        return
    tables = ", ".join(f'"{table.name}"' for table in schema.metadata.sorted_tables)
    with database.read() as connection:
        connection.exec_driver_sql("set statement_timeout = 0")
        try:
            connection.exec_driver_sql(f"vacuum {tables}")
        finally:
            connection.exec_driver_sql("reset statement_timeout")

"""The catalogue's tables, as its newest schema has them. How older ones get there: `storage.migrations`."""

from typing import Final

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql

SCHEMA: Final = 6  # grows with every migration; `about.schema` tells a database's own

metadata = sa.MetaData()


def _sorted_text(size: int) -> sa.String:
    """Text that PostgreSQL orders by its bytes, as SQLite does: listings page by it."""
    return sa.String(size).with_variant(postgresql.VARCHAR(size, collation="C"), "postgresql")


about = sa.Table(
    "about",
    metadata,
    sa.Column("schema", sa.Integer, nullable=False),
    sa.Column("store", sa.Uuid, nullable=True),  # whose catalogue it is; null in one that schema 1 made
)
groups = sa.Table(
    "groups",
    metadata,
    sa.Column("uuid", sa.Uuid, primary_key=True),
    sa.Column("name", sa.String(64), nullable=False, unique=True),
    # copies of what the store's group record says, for those who may only read the catalogue
    sa.Column("pcrs", sa.String(128), nullable=False, server_default=""),
    sa.Column("locality", sa.Integer, nullable=True),
    sa.Column("created", sa.String(32), nullable=False, server_default=""),
)
vtpms = sa.Table(
    "vtpms",
    metadata,
    sa.Column("uuid", sa.Uuid, primary_key=True),
    sa.Column("name", _sorted_text(64), nullable=False, unique=True),
    sa.Column("group", sa.Uuid, nullable=False, index=True),
    sa.Column("family", sa.String(3), nullable=False),
    sa.Column("state_image", sa.Text, nullable=False),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("mac", sa.LargeBinary(32), nullable=False),
)
labels = sa.Table(
    "labels",
    metadata,
    sa.Column("vtpm", sa.Uuid, sa.ForeignKey("vtpms.uuid", ondelete="CASCADE"), primary_key=True),
    sa.Column("key", _sorted_text(64), primary_key=True),
    sa.Column("value", sa.String(128), nullable=False),
    sa.Index("ix_labels_key", "key", "value", "vtpm"),
)
attachments = sa.Table(
    "attachments",
    metadata,
    sa.Column("vtpm", sa.Uuid, primary_key=True),
    sa.Column("guest", sa.String(64), nullable=False, index=True),
    sa.Column("frontend", sa.String(16), nullable=False),
    sa.Column("owner", sa.String(32), nullable=False),
    sa.Column("mode", sa.String(8), nullable=False),
    sa.Column("startup", sa.String(16), nullable=False),
    sa.Column("lease", sa.BigInteger, nullable=False),
    sa.Column("created", sa.String(32), nullable=False),
    sa.Column("mac", sa.LargeBinary(32), nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    sa.Column("hibernate_after", sa.Integer, nullable=True),
    sa.Column("commands_per_second", sa.Integer, nullable=False, server_default="0"),
    sa.Column("saves_per_second", sa.Integer, nullable=False, server_default="0"),
    sa.Column("nv_bytes", sa.Integer, nullable=False, server_default="0"),
    sa.Column("hw_pcrs", sa.String(64), nullable=False, server_default=""),
    sa.Column("tcp_port", sa.Integer, nullable=False, server_default="0"),
    sa.Column("domain", sa.String(64), nullable=False, server_default=""),
    sa.Column("xsm_label", sa.String(256), nullable=False, server_default=""),
    sa.Column("instance_domain", sa.String(64), nullable=False, server_default=""),
    sa.Column("localities", sa.Integer, nullable=False, server_default="1"),
    sa.Column("compat", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("maintenance", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("trace", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("bound_domain", sa.Integer, nullable=True),
    sa.Column("bound_uuid", sa.String(36), nullable=False, server_default=""),
    sa.Column("bound_boot", sa.String(36), nullable=False, server_default=""),
    sa.Column("bound_since", sa.String(32), nullable=False, server_default=""),
    sa.Column("ran_before", sa.Boolean, nullable=True),
    sa.Column("measure", sa.Text, nullable=False, server_default=""),
    sa.Column("measured", sa.Text, nullable=False, server_default=""),
)
events = sa.Table(
    "events",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("time", sa.String(32), nullable=False, index=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("vtpm", sa.Uuid, nullable=True, index=True),
    sa.Column("text", sa.Text, nullable=False),
)

# Alembic's own table, which it leaves out of its comparisons: made here so that a new catalogue needs no Alembic.
alembic_metadata = sa.MetaData()
alembic_version = sa.Table(
    "alembic_version", alembic_metadata, sa.Column("version_num", sa.String(32), primary_key=True)
)


def revision_of(schema: int) -> str:
    """Return the name of the migration that leads to a schema."""
    return f"{schema:04}"


def make_tables(connection: sa.Connection) -> None:
    """Make every table in an empty database, marked as the newest schema; the caller adds the row of `about`."""
    metadata.create_all(connection, checkfirst=False)
    alembic_metadata.create_all(connection, checkfirst=False)
    connection.execute(alembic_version.insert().values(version_num=revision_of(SCHEMA)))

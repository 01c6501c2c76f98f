"""The first schema: what `create` of version 0.1.0 made. Databases that have it are stamped, not migrated."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Make the tables of schema 1."""
    op.create_table("about", sa.Column("schema", sa.Integer, nullable=False))
    op.create_table(
        "groups",
        sa.Column("uuid", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(64), nullable=False, unique=True),
    )
    op.create_table(
        "vtpms",
        sa.Column("uuid", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(64, collation=_bytewise()), nullable=False, unique=True),
        sa.Column("group", sa.Uuid, nullable=False, index=True),
        sa.Column("family", sa.String(3), nullable=False),
        sa.Column("state_image", sa.Text, nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("mac", sa.LargeBinary(32), nullable=False),
    )
    op.create_table(
        "attachments",
        sa.Column("vtpm", sa.Uuid, primary_key=True),
        sa.Column("guest", sa.String(64), nullable=False, index=True),
        sa.Column("frontend", sa.String(16), nullable=False),
        sa.Column("owner", sa.String(32), nullable=False),
        sa.Column("mode", sa.String(8), nullable=False),
        sa.Column("startup", sa.String(8), nullable=False),
        sa.Column("lease", sa.BigInteger, nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("mac", sa.LargeBinary(32), nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
        sa.Column("time", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("vtpm", sa.Uuid, nullable=True, index=True),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.execute("insert into about values (1)")


def _bytewise() -> str | None:
    """Return the collation that orders names by their bytes; SQLite's own does."""
    return "C" if op.get_bind().dialect.name == "postgresql" else None

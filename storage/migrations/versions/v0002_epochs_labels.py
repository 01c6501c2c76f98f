"""Schema 2: attachment epochs, labels, whose catalogue it is, public data of groups, events found by their time.

Rows keep their MACs: an epoch of 0 is not part of them (catalogue_rows.canonical).
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add to the tables of schema 1."""
    collation = "C" if op.get_bind().dialect.name == "postgresql" else None
    op.add_column("about", sa.Column("store", sa.Uuid, nullable=True))
    op.add_column("groups", sa.Column("pcrs", sa.String(128), nullable=False, server_default=""))
    op.add_column("groups", sa.Column("locality", sa.Integer, nullable=True))
    op.add_column("groups", sa.Column("created", sa.String(32), nullable=False, server_default=""))
    op.add_column("attachments", sa.Column("epoch", sa.Integer, nullable=False, server_default="0"))
    op.create_table(
        "labels",
        sa.Column("vtpm", sa.Uuid, sa.ForeignKey("vtpms.uuid", ondelete="CASCADE"), primary_key=True),
        sa.Column("key", sa.String(64, collation=collation), primary_key=True),
        sa.Column("value", sa.String(128), nullable=False),
    )
    op.create_index("ix_labels_key", "labels", ["key", "value", "vtpm"])
    op.create_index("ix_events_time", "events", ["time"])
    op.execute("update about set schema = 2")

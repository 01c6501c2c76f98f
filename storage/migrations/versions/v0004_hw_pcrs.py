"""Schema 4: which hardware PCRs an attached vTPM gets at its start.

Rows keep their MACs: a value that is not there is not part of them (catalogue_rows.canonical).
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add the column."""
    op.add_column("attachments", sa.Column("hw_pcrs", sa.String(64), nullable=False, server_default=""))
    op.execute("update about set schema = 4")

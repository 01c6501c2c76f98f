"""Schema 5: the TCP ports of an attached vTPM.

Rows keep their MACs: a value that is not there is not part of them (catalogue_rows.canonical).
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column."""
    op.add_column("attachments", sa.Column("tcp_port", sa.Integer, nullable=False, server_default="0"))
    op.execute("update about set schema = 5")

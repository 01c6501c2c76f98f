"""Schema 3: what attachments say of their instances: hibernated after how long, with which quotas.

Rows keep their MACs: a value that is not there is not part of them (catalogue_rows.canonical).
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add the columns."""
    op.add_column("attachments", sa.Column("hibernate_after", sa.Integer, nullable=True))
    for quota in ("commands_per_second", "saves_per_second", "nv_bytes"):
        op.add_column("attachments", sa.Column(quota, sa.Integer, nullable=False, server_default="0"))
    op.execute("update about set schema = 3")

"""Schema 6: attachments by Xen's ring: which domain, with what, and which one had the vTPM last.

Rows keep their MACs: a value that is not there is not part of them (catalogue_rows.canonical).
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add the columns, and room for the startup "deactivated"."""
    if op.get_bind().dialect.name == "postgresql":
        op.alter_column("attachments", "startup", type_=sa.String(16))
    else:  # SQLite cannot alter a column, and holds no text to its length: only what it says of itself changes
        with op.batch_alter_table("attachments") as batch:
            batch.alter_column("startup", type_=sa.String(16))
    for name, size in (("domain", 64), ("xsm_label", 256), ("instance_domain", 64)):
        op.add_column("attachments", sa.Column(name, sa.String(size), nullable=False, server_default=""))
    op.add_column("attachments", sa.Column("localities", sa.Integer, nullable=False, server_default="1"))
    for name in ("compat", "maintenance", "trace"):
        op.add_column("attachments", sa.Column(name, sa.Boolean, nullable=False, server_default=sa.false()))
    op.add_column("attachments", sa.Column("bound_domain", sa.Integer, nullable=True))
    for name, size in (("bound_uuid", 36), ("bound_boot", 36), ("bound_since", 32)):
        op.add_column("attachments", sa.Column(name, sa.String(size), nullable=False, server_default=""))
    op.add_column("attachments", sa.Column("ran_before", sa.Boolean, nullable=True))
    for name in ("measure", "measured"):
        op.add_column("attachments", sa.Column(name, sa.Text, nullable=False, server_default=""))
    op.execute("update about set schema = 6")

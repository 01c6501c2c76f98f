"""Schema 3 is that of hibernation, which is made elsewhere at the same time: its migration takes the place of this."""

from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Only count."""
    op.execute("update about set schema = 3")

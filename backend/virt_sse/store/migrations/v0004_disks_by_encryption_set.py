"""An index of the disks by their encryption set."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_index("disks_by_encryption_set", "disks", ["encryption_set_id"])

"""Deleted disks that can be recovered: time of the deletion, and of the scheduled purge."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"


def upgrade() -> None:
    op.add_column("disks", sa.Column("deleted", sa.Text))
    op.add_column("disks", sa.Column("scheduled_purge", sa.Text))

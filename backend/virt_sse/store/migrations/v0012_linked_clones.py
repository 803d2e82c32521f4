"""Linked clones: disks read from an image below where nothing was written yet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("disks", sa.Column("base_id", sa.Uuid))

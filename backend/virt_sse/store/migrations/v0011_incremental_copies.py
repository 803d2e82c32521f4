"""Incremental copies and linked clones: images with what differs from the copy below."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.add_column("disks", sa.Column("base_id", sa.Uuid))

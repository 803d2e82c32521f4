"""Copies of disks: snapshots, images and restore points are rows of ``disks``, told apart by their kind."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    op.add_column("disks", sa.Column("kind", sa.String(16), nullable=False, server_default="disk"))
    op.add_column("disks", sa.Column("source_id", sa.Uuid))
    op.add_column("disks", sa.Column("point", sa.Uuid))

"""Copies of disks: re-encryption and encryption in place; serial numbers of disks for guests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.add_column("disks", sa.Column("serial", sa.String(80)))
    op.create_table(
        "copies",
        sa.Column("disk_id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("source_id", sa.Uuid),
        sa.Column("source_path", sa.Text),
        sa.Column("source_device", sa.BigInteger),
        sa.Column("source_inode", sa.BigInteger),
        sa.Column("final_path", sa.Text),
        sa.Column("domain_id", sa.Uuid),
        sa.Column("target", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("is_detached", sa.Boolean, nullable=False),
        sa.Column("is_cancelled", sa.Boolean, nullable=False),
        sa.Column("max_rate", sa.BigInteger),
    )

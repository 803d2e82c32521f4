"""Disk encryption sets, and which of them a disk is in."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "encryption_sets",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False, unique=True),
        sa.Column("key_provider", sa.String(64), nullable=False),
        sa.Column("key_name", sa.Text, nullable=False),
        sa.Column("key_version", sa.String(64)),
        sa.Column("encryption_type", sa.String(64), nullable=False),
        sa.Column("automatic_rotation", sa.Boolean, nullable=False),
        sa.Column("subscription", sa.String(64), nullable=False),
        sa.Column("region", sa.String(64), nullable=False),
        sa.Column("tenant", sa.String(64)),
        sa.Column("identity", sa.String(64)),
        sa.Column("revocation", sa.String(16), nullable=False),
        sa.Column("grace_seconds", sa.Integer, nullable=False),
        sa.Column("created", sa.String(40), nullable=False),
    )
    # Added in place: Alembic's copy-and-move for SQLite would drop the old table, and by cascade every
    # wrapped DEK with it.
    op.add_column("disks", sa.Column("sku", sa.String(32), nullable=False, server_default="Premium_LRS"))
    op.add_column(
        "disks",
        sa.Column("encryption_set_id", sa.Uuid, sa.ForeignKey("encryption_sets.id")),
        inline_references=True,
    )

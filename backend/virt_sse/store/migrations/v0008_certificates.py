"""Deletion certificates, and the origin of copies, which the certificates name."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("disks", sa.Column("origin_id", sa.Uuid))
    op.create_table(
        "certificates",
        sa.Column("disk_id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("issued", sa.String(40)),
    )

"""Deletion certificates with the origin of copies, which the certificates name; scale sets."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("disks", sa.Column("origin_id", sa.Uuid))
    op.create_table(
        "certificates",
        sa.Column("disk_id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False),
        sa.Column("document", sa.Text, nullable=False),
        sa.Column("issued", sa.String(40)),
    )
    op.create_table(
        "scale_sets",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False, unique=True),
        sa.Column("definition", sa.Text, nullable=False),
        sa.Column("image_id", sa.Uuid, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("encryption_at_host", sa.Boolean, nullable=False),
        sa.Column("created", sa.String(40), nullable=False),
        sa.Column("is_deleting", sa.Boolean, nullable=False),
    )
    op.create_table(
        "scale_set_instances",
        sa.Column("set_id", sa.Uuid, sa.ForeignKey("scale_sets.id"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("domain_id", sa.Uuid, nullable=False),
        sa.Column("disk_id", sa.Uuid, nullable=False),
        sa.Column("encryption_at_host", sa.Boolean, nullable=False),
    )

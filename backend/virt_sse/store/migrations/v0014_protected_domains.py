"""Domains whose definitions the store keeps."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"


def upgrade() -> None:
    op.create_table(
        "protected_domains",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("host_id", sa.Uuid, sa.ForeignKey("hosts.id"), nullable=False),
        sa.Column("definition", sa.Text, nullable=False),
        sa.Column("is_autostarted", sa.Boolean, nullable=False),
        sa.Column("seal", sa.LargeBinary, nullable=False),
        sa.Column("evacuation", sa.String(16), nullable=False),
    )
    op.create_index("protected_domains_by_host", "protected_domains", ["host_id"])

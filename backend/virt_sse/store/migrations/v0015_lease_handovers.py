"""The next holders of leases: destinations of live migrations."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"


def upgrade() -> None:
    op.create_table(
        "lease_handovers",
        sa.Column(
            "resource_id", sa.Uuid, sa.ForeignKey("leases.resource_id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("host_id", sa.Uuid, sa.ForeignKey("hosts.id"), nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
    )

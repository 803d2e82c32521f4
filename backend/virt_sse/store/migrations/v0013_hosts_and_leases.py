"""Hosts, and leases of hosts on disks and VMs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0011"


def upgrade() -> None:
    op.create_table(
        "hosts",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("boot_id", sa.Uuid, nullable=False),
        sa.Column("seen", sa.BigInteger, nullable=False),
        sa.Column("fenced", sa.BigInteger),
    )
    op.create_table(
        "leases",
        sa.Column("resource_id", sa.Uuid, primary_key=True),
        sa.Column("host_id", sa.Uuid, sa.ForeignKey("hosts.id"), nullable=False),
    )
    op.create_index("leases_by_host", "leases", ["host_id"])
    op.create_table(
        "lease_users",
        sa.Column(
            "resource_id", sa.Uuid, sa.ForeignKey("leases.resource_id", ondelete="CASCADE"), primary_key=True
        ),
        sa.Column("user_id", sa.Uuid, primary_key=True),
        sa.Column("since", sa.BigInteger, nullable=False),
    )

"""Stores with many disks: indices for the queries of starts and polls, and numbered changes of paths."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"


def upgrade() -> None:
    op.add_column("disks", sa.Column("path_number", sa.BigInteger, nullable=False, server_default="0"))
    for name, column in (
        ("disks_by_state", "state"),
        ("disks_by_source", "source_id"),
        ("disks_by_origin", "origin_id"),
        ("disks_by_base", "base_id"),
        ("disks_by_path_number", "path_number"),
    ):
        op.create_index(name, "disks", [column])
    op.create_index("lease_users_by_user", "lease_users", ["user_id"])
    op.create_table(
        "counters",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )

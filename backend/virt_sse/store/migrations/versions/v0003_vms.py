"""Virtual machines, and what hosts cache of their disks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "vms",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("host", sa.Uuid, nullable=False),
        sa.Column("encryption_at_host", sa.Boolean, nullable=False),
        sa.Column("size", sa.String(64)),
        sa.Column("temp_disk_size", sa.BigInteger),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("pending", sa.Text),
        sa.Column("tpm_algorithm", sa.String(32)),
        sa.Column("tpm_ciphertext", sa.LargeBinary),
        sa.Column("tpm_key_provider", sa.String(64)),
        sa.Column("tpm_key_name", sa.Text),
        sa.Column("tpm_key_version", sa.String(64)),
    )
    # Added in place, as in 0002.
    op.add_column("disks", sa.Column("caching", sa.String(16), nullable=False, server_default="None"))

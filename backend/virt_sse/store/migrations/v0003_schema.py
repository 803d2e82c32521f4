"""The schema of version 0.1.0.

The revisions 0001 and 0002, of development versions, were merged into this revision. A later migration that
adds a column to ``disks`` must do so in place (``op.add_column`` with ``inline_references``): Alembic's batch
mode for SQLite drops the old table, and by cascade every wrapped DEK.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = None


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
    op.create_table(
        "disks",
        sa.Column("id", sa.Uuid, primary_key=True),
        sa.Column("name", sa.String(80), nullable=False, unique=True),
        sa.Column("path", sa.Text, nullable=False, unique=True),
        sa.Column("format", sa.String(16), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("encryption_type", sa.String(64), nullable=False),
        sa.Column("created", sa.String(40), nullable=False),
        sa.Column("generation", sa.Integer, nullable=False),
        sa.Column("sku", sa.String(32), nullable=False, server_default="Premium_LRS"),
        sa.Column("encryption_set_id", sa.Uuid, sa.ForeignKey("encryption_sets.id")),
        sa.Column("caching", sa.String(16), nullable=False, server_default="None"),
    )
    op.create_table(
        "wrapped_deks",
        sa.Column("disk_id", sa.Uuid, sa.ForeignKey("disks.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("position", sa.Integer, primary_key=True),
        sa.Column("slot", sa.String(32), nullable=False),
        sa.Column("cipher", sa.String(64), nullable=False),
        sa.Column("algorithm", sa.String(32), nullable=False),
        sa.Column("ciphertext", sa.LargeBinary, nullable=False),
        sa.Column("key_provider", sa.String(64), nullable=False),
        sa.Column("key_name", sa.Text, nullable=False),
        sa.Column("key_version", sa.String(64), nullable=False),
    )
    op.create_index("wrapped_deks_by_key", "wrapped_deks", ["key_provider", "key_name", "key_version"])
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

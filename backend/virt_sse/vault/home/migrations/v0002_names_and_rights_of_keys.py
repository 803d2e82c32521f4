"""Names of keys that differ in more than case, as in Azure Key Vault; permissions on single keys."""

from __future__ import annotations

import itertools

import sqlalchemy as sa
from alembic import op

from virt_sse.errors import VaultError

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    names = op.get_bind().scalars(sa.text("SELECT name FROM keys ORDER BY lower(name), name")).all()
    alike = [pair for pair in itertools.pairwise(names) if pair[0].lower() == pair[1].lower()]
    if alike:
        listed = ", ".join(f"{first!r} and {second!r}" for first, second in alike)
        raise VaultError(
            f"keys whose names differ in case alone: {listed}",
            hint="with the version before: move the disks off one of each, delete and purge that key",
        )
    op.create_index("keys_by_lower_name", "keys", [sa.text("lower(name)")], unique=True, if_not_exists=True)
    op.create_table(
        "key_permissions",
        sa.Column(
            "client_id",
            sa.String(36),
            sa.ForeignKey("principals.client_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column(
            "key",
            sa.String(127).with_variant(sa.String(127, collation="C"), "postgresql"),
            primary_key=True,
        ),
        sa.Column("permission", sa.String(32), primary_key=True),
    )
    op.create_index("key_permissions_by_key", "key_permissions", ["key"])

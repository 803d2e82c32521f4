"""The schema of version 0.1.0.

Development versions kept a number in SQLite's ``user_version`` instead of Alembic's table. Their databases
have all of these tables (number 2) or all except ``leftovers`` (number 1): only missing tables are created.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NUMBER = sa.Integer().with_variant(sa.BigInteger(), "postgresql")
_KEY_NAME = sa.String(127).with_variant(sa.String(127, collation="C"), "postgresql")


def upgrade() -> None:
    _create(
        "keys",
        sa.Column("name", _KEY_NAME, primary_key=True),
        sa.Column("deleted", _NUMBER),
        sa.Column("purge", _NUMBER),
        sa.Column("policy", sa.Text),
    )
    _create(
        "versions",
        sa.Column("sequence", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("name", _KEY_NAME, sa.ForeignKey("keys.name", ondelete="CASCADE"), nullable=False),
        sa.Column("version", sa.String(32), nullable=False),
        sa.Column("key_type", sa.String(16), nullable=False),
        sa.Column("n", sa.LargeBinary, nullable=False),
        sa.Column("e", _NUMBER, nullable=False),
        sa.Column("operations", sa.Text, nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("not_before", _NUMBER),
        sa.Column("expires", _NUMBER),
        sa.Column("created", _NUMBER, nullable=False),
        sa.Column("updated", _NUMBER, nullable=False),
        sa.Column("tags", sa.Text, nullable=False),
        sa.Column("stored", sa.LargeBinary, nullable=False),
        sa.UniqueConstraint("name", "version"),
        sqlite_autoincrement=True,
    )
    _create(
        "leftovers",
        sa.Column("name", _KEY_NAME, primary_key=True),
        sa.Column("version", sa.String(32), primary_key=True),
        sa.Column("key_type", sa.String(16), nullable=False),
    )
    _create(
        "principals",
        sa.Column("client_id", sa.String(36), primary_key=True),
        sa.Column("object_id", sa.String(36), nullable=False, unique=True),
        sa.Column("name", sa.String(128), nullable=False, unique=True),
        sa.Column("public_key", sa.Text, nullable=False),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("enabled", sa.Boolean, nullable=False),
        sa.Column("expires", _NUMBER),
        sa.Column("created", _NUMBER, nullable=False),
        sa.Column("created_by", sa.String(36)),
    )
    _create(
        "permissions",
        sa.Column(
            "client_id",
            sa.String(36),
            sa.ForeignKey("principals.client_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("permission", sa.String(32), primary_key=True),
    )
    _create(
        "assertions",
        sa.Column("digest", sa.LargeBinary, primary_key=True),
        sa.Column("expires", _NUMBER, nullable=False),
    )
    op.create_index("assertions_by_expiry", "assertions", ["expires"], if_not_exists=True)
    _create(
        "sealed_secrets",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("sealed", sa.LargeBinary, nullable=False),
    )


def _create(name: str, *columns: sa.schema.SchemaItem, sqlite_autoincrement: bool = False) -> None:
    op.create_table(name, *columns, if_not_exists=True, sqlite_autoincrement=sqlite_autoincrement)

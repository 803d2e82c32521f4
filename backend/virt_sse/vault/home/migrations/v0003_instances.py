"""Several instances of a vault: a number of changes, and the time at which material began to be made."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    changes = op.create_table(
        "changes", sa.Column("number", sa.Integer().with_variant(sa.BigInteger(), "postgresql"))
    )
    op.bulk_insert(changes, [{"number": 0}])
    op.add_column(
        "leftovers", sa.Column("announced", sa.Integer().with_variant(sa.BigInteger(), "postgresql"))
    )

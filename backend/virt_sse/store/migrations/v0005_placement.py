"""The placement of the DEKs of an encryption set's disks."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.add_column("encryption_sets", sa.Column("placement", sa.String(16)))

"""The schema of the store, for code that does without SQLAlchemy."""

from __future__ import annotations

SCHEMA = "0017"
"""The newest migration. A constant, so that up-to-date stores are recognised without importing Alembic."""

BUSY_TIMEOUT_SECONDS = 30
"""How long a statement waits for a concurrent transaction."""

"""Alembic's environment: runs migrations on the connection of :func:`virt_sse.system.migrations.upgrade`."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transaction_per_migration=False)
context.run_migrations()

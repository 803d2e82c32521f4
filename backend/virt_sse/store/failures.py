"""Failures of the store's database, named by cause."""

from __future__ import annotations

import sqlite3

import sqlalchemy as sa

from virt_sse.errors import StoreError, StoreReadOnlyError, StoreUnavailableError
from virt_sse.system.postgresql import is_read_only, sqlstate
from virt_sse.system.sqlite import reason

_CONNECTION_EXCEPTION = "08"
_UNAVAILABLE = {"57P01", "57P02", "57P03", "53300"}
"""SQLSTATE of shutdowns, of a crash of another session, of a start-up under way, of too many connections
(PostgreSQL, appendix "Error Codes")."""


def failure(exc: Exception, doing: str) -> StoreError:
    """The error that names the cause of a failed database operation.

    :param doing: the beginning of the message.
    """
    message = f"{doing}: {reason(exc)}"
    if _is_read_only(exc):
        return StoreReadOnlyError(
            message, hint="the database accepts no changes now: a standby, or a primary without room"
        )
    if _is_unavailable(exc):
        return StoreUnavailableError(
            message, hint="running domains go on; check the database server and url in [store]"
        )
    return StoreError(message)


def _is_read_only(exc: Exception) -> bool:
    cause = getattr(exc, "orig", None)
    code = getattr(cause, "sqlite_errorcode", 0) & 0xFF  # the primary result code
    return is_read_only(exc) or code == sqlite3.SQLITE_READONLY


def _is_unavailable(exc: Exception) -> bool:
    if not isinstance(exc, sa.exc.DBAPIError) or isinstance(exc.orig, sqlite3.Error):
        return False
    state = sqlstate(exc)
    return (
        exc.connection_invalidated
        or state in _UNAVAILABLE
        or state.startswith(_CONNECTION_EXCEPTION)
        or (isinstance(exc, sa.exc.OperationalError) and not state)  # libpq: no connection
    )

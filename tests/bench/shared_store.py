"""A PostgreSQL server for benchmarks, as durable as in production."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from virt_sse.errors import LabUnavailableError

sys.path.append(str(Path(__file__).parent.parent))
from support.postgresql import PostgresqlServer


@contextlib.contextmanager
def postgresql() -> Iterator[PostgresqlServer]:
    """A server of its own.

    :raise LabUnavailableError: When the server or psycopg is not installed.
    """
    with TemporaryDirectory(prefix="virt-sse-") as name:
        Path(name).chmod(0o711)
        try:
            server = PostgresqlServer(Path(name), is_durable=True)
        except pytest.skip.Exception as exc:
            raise LabUnavailableError(str(exc)) from exc
        try:
            yield server
        finally:
            server.stop()

"""Stores changed behind virt-sse's back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import sqlalchemy as sa


@contextlib.contextmanager
def connected(url: str) -> Iterator[sa.Connection]:
    """A transaction of another program in the store's database."""
    engine = sa.create_engine(url)
    try:
        with engine.begin() as connection:
            yield connection
    finally:
        engine.dispose()


def execute(url: str, statement: str, **parameters: object) -> list[tuple[object, ...]]:
    """Run a statement in the store's database; its rows, if any."""
    with connected(url) as connection:
        result = connection.execute(sa.text(statement), parameters)
        return [tuple(row) for row in result] if result.returns_rows else []

"""Progress of a long operation."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[float], None]
"""A callback for progress: called with the completed fraction, from 0.0 to 1.0."""


def silent(_fraction: float) -> None:
    """A :data:`Progress` without output."""

"""Folders of the repository, for tests wherever these lie."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
VECTORS = TESTS / "vectors"
GOLDEN = TESTS / "golden"
REPOSITORY = TESTS.parent

"""The language of docstrings and comments."""

from __future__ import annotations

import prose

MOST_VAGUE_PERCENT = 2.0


def test_docstrings_and_comments_name_things() -> None:
    found = [text for path in prose.sources() for text in prose.texts(path)]
    assert prose.share(found) <= MOST_VAGUE_PERCENT, "python tests/prose.py -v names the worst files"


def test_every_public_docstring_begins_with_a_summary() -> None:
    assert [each for path in prose.sources() for each in prose.without_summary(path)] == []

"""Each rule in the reference of restrictions has its message in the code, and its test."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from support.folders import REPOSITORY

REFERENCE = REPOSITORY / "backend/docs/reference/restrictions.md"
LINK = re.compile(r"\[`(\w+)`\]\(([^)]+)\)")


def rows() -> list[list[str]]:
    """The cells of the table of the cloud's rules."""
    _, _, section = REFERENCE.read_text("utf-8").partition("\n## Cloud rules\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def messages() -> Iterator[str]:
    """The texts in the code, with ``{}`` for values; implicitly joined texts are one text."""
    for folder in ("backend/virt_sse", "plugins/virt_sse_plugins"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                    yield "".join(map(str, parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_every_restriction_names_tests_that_exist() -> None:
    assert len(rows()) > 20
    for row in rows():
        found = LINK.findall(row[-1])
        assert found, row
        for name, place in found:
            path = (REFERENCE.parent / place).resolve()
            assert f"\ndef {name}(" in path.read_text("utf-8"), (name, Path(place).name)


def test_every_restriction_has_its_own_message_in_the_code() -> None:
    texts = [row[2].strip("`").strip() for row in rows()]
    assert len(set(texts)) == len(texts)
    said = list(messages())
    for text in texts:
        assert any(text in each for each in said), text

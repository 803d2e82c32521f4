"""Every command that a message, a help text or a docstring names exists, with the options named."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from typer.core import TyperGroup

from support.command_tree import root
from support.folders import REPOSITORY

_COMMAND = re.compile(r"virt-sse(?: +(?:--?)?[a-z][a-z-]*)+")
_EXTRAS = re.compile(r"virt-sse\[")


def texts() -> Iterator[tuple[str, str]]:
    """All strings of the sources, each with its file; a value in an f-string is ``VALUE``."""
    for folder in ("backend", "plugins"):
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            parts = {
                id(each) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for each in node.values
            }
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    pieces = [
                        str(each.value) if isinstance(each, ast.Constant) else "VALUE" for each in node.values
                    ]
                    yield path.name, "".join(pieces)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                    yield path.name, node.value


def problem(words: list[str]) -> str | None:
    """What is wrong with the words of a command after ``virt-sse``."""
    command, path = root(), "virt-sse"
    for word in words:
        if word.startswith("-"):
            names = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
            if word not in names | {"--help", "-h"}:
                return f"{path} has no option {word}"
        elif isinstance(command, TyperGroup):
            if word not in command.commands:
                return f"{path} has no command {word}"
            command, path = command.commands[word], f"{path} {word}"
        else:
            break  # an argument, or the text after the command
    return None


def test_every_named_command_exists() -> None:
    found = 0
    problems = []
    for file, text in texts():
        for quoted in re.findall(r"'(virt-sse [^']*)'|``(virt-sse [^`]*)``", " ".join(text.split())):
            words = re.sub(r"\\b[A-Z][A-Z_]*\\b", "", "".join(quoted)).split()[1:]
            found += 1
            if said := problem([word for word in words if re.fullmatch(r"-{0,2}[a-z][a-z-]*", word)]):
                problems.append(f"{file}: {said}: {''.join(quoted)}")
    assert problems == []
    assert found > 50

"""``python tests/prose.py [-v]``: the share of vague words in docstrings and comments, and the worst files.

Vague words are pronouns and relative words: a text with few of them names things. With ``-v`` each docstring
and comment with such words is printed, too.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VAGUE = {"it", "that", "one", "what", "who", "those", "others", "another", "nobody", "whom", "whose"}
REPOSITORY = Path(__file__).parents[1]
WORST = 20


@dataclass(frozen=True)
class Text:
    """A docstring or comment.

    :ivar line: the number of its first line.
    """

    path: Path
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        return re.findall(r"[a-z']+", self.text.lower())

    @property
    def vague(self) -> int:
        """The number of vague words."""
        return sum(word in VAGUE for word in self.words)


def sources() -> list[Path]:
    """All Python files of virt-sse and its plugins."""
    return [path for folder in ("backend", "plugins") for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def texts(path: Path) -> Iterator[Text]:
    """All docstrings and comments of a file, docstrings of constants included."""
    source = path.read_text("utf-8")
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for statement in body:
                match statement:
                    case ast.Expr(ast.Constant(str(text))):
                        yield Text(path, statement.lineno, text)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(path, token.start[0], token.string[1:])


def share(found: list[Text]) -> float:
    """Vague words in percent of all words."""
    return 100 * sum(text.vague for text in found) / max(1, sum(len(text.words) for text in found))


def without_summary(path: Path) -> Iterator[str]:
    """Public docstrings that begin with a field such as ``:param x:``, as ``path:line: name``."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = getattr(node, "name", path.stem)
            is_public = not name.startswith("_") or name.startswith("__")
            if is_public and (ast.get_docstring(node) or "").startswith(":"):
                yield f"{path.relative_to(REPOSITORY)}:{node.body[0].lineno}: {name}"


def main() -> None:
    """Print the share of vague words."""
    by_path = {path: list(texts(path)) for path in sources()}
    for path, found in sorted(by_path.items(), key=lambda each: share(each[1]))[-WORST:]:
        print(f"{share(found):5.1f} % {path.relative_to(REPOSITORY)}")
        if "-v" in sys.argv:
            for text in found:
                if text.vague:
                    print(f"    {text.line}: {' '.join(text.text.split())}")
    print(f"{share([text for found in by_path.values() for text in found]):5.2f} % in all")


if __name__ == "__main__":
    main()

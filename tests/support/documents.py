"""Reads the project's Markdown documents: code blocks, links, headings, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.cli.global_options import DECLARATIONS
from virt_sse.cli.reference import CommandReference

CHECKOUT = Path(__file__).parents[2]

_MARK = re.compile(r"\s*<!--\s*run:\s*(.*?)\s*-->\s*")
_FENCE = re.compile(r"(\s*)(`{3,}|~{3,})\s*(\w*).*")
_SPAN = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_DEFINITION = re.compile(r"^\s{0,3}\[[^\]]+\]:\s*<?(\S+?)>?\s*$", re.MULTILINE)
_ANYWHERE = {"-h", "--help", "--version", *(name for names in DECLARATIONS.values() for name in names)}


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced code block.

    :ivar line: number of the line with the fence.
    :ivar run: the text of a ``<!-- run: … -->`` in the line before the fence.
    """

    line: int
    language: str
    text: str
    run: str | None


class Document:
    """A Markdown document of the checkout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = str(path.relative_to(CHECKOUT)) if path.is_relative_to(CHECKOUT) else path.name
        self.blocks: list[Block] = []
        self.stray_marks: list[int] = []
        """Line numbers of run marks without a code block in the next line."""
        self._prose = self._split(path.read_text("utf-8").splitlines())

    def _split(self, lines: list[str]) -> str:
        """Collect the code blocks; the text without the blocks."""
        prose: list[str] = []
        mark: tuple[int, str] | None = None
        rest = iter(enumerate(lines, 1))
        for number, line in rest:
            if opening := _FENCE.fullmatch(line):
                indent, fence, language = opening.groups()
                body = []
                for _, inner in rest:
                    if inner.strip().startswith(fence) and not inner.strip().strip(fence[0]):
                        break
                    body.append(inner.removeprefix(indent))
                text = "".join(f"{each}\n" for each in body)
                self.blocks.append(Block(number, language, text, mark[1] if mark else None))
                mark = None
                continue
            if mark:
                self.stray_marks.append(mark[0])
            mark = (number, found[1]) if (found := _MARK.fullmatch(line)) else None
            prose.append(line)
        if mark:
            self.stray_marks.append(mark[0])
        return "\n".join(prose)

    def anchors(self) -> set[str]:
        """The anchors of the headings, as GitHub names them, and explicit ones."""
        found = set(re.findall(r"<a\s+(?:id|name)=\"([^\"]+)\"", self._prose))
        for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", self._prose, re.MULTILINE):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
            slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            repeated = (f"{slug}-{number}" for number in range(1, 100))
            found.add(slug if slug not in found else next(each for each in repeated if each not in found))
        return found

    def links(self) -> list[str]:
        """The targets of links within the project, with their anchors."""
        text = _SPAN.sub("", self._prose)
        targets = [*_LINK.findall(text), *_DEFINITION.findall(text)]
        return [each for each in targets if not re.match(r"[a-z][a-z0-9+.-]*:", each)]

    def code_spans(self) -> list[str]:
        """Inline code, each piece as one line."""
        return [" ".join(content.split()) for _, content in _SPAN.findall(self._prose)]

    def shell_lines(self) -> Iterator[str]:
        """The commands in ``sh`` and ``console`` blocks, continuation lines joined."""
        for block in self.blocks:
            lines = re.sub(r"\\\n\s*", " ", block.text).splitlines()
            if block.language in ("sh", "bash", "shell"):
                yield from lines
            elif block.language == "console":
                yield from (line[2:] for line in lines if line[:2] in ("$ ", "# "))


def documents() -> list[Document]:
    """All documents for people, in the order of their names."""
    paths = [CHECKOUT / "README.md", CHECKOUT / "CHANGELOG.md", CHECKOUT / "plugins/README.md"]
    paths += [*(CHECKOUT / ".github").glob("*.md"), *(CHECKOUT / "backend/docs").rglob("*.md")]
    return [Document(path) for path in sorted(paths) if path.exists()]


def broken_links(document: Document) -> list[str]:
    """The links of *document* to files or headings that do not exist."""
    found = []
    for link in document.links():
        name, _, anchor = link.partition("#")
        target = (document.path.parent / name).resolve() if name else document.path
        if not target.exists() or (anchor and anchor not in Document(target).anchors()):
            found.append(link)
    return found


def unknown_commands(document: Document, root: CommandReference) -> list[str]:
    """The calls of ``virt-sse`` in *document* whose command or option does not exist.

    Inline code may leave out ``virt-sse``: ``disk create NAME``.
    """
    found = []
    nouns = "|".join(each.path[0] for each in root.commands)
    for span in document.code_spans():
        short = re.match(rf"(?:{nouns}) [a-z-]+(?: |$)", span)
        found += [each for each in _calls(f"virt-sse {span}" if short else span) if _unknown(each, root)]
    for line in document.shell_lines():
        found += [each for each in _calls(line) if _unknown(each, root)]
    return [" ".join(["virt-sse", *each]) for each in found]


def _calls(line: str) -> Iterator[list[str]]:
    """The words after each ``virt-sse`` in a shell's *line*."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&()<>")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # a quotation that ends in another line, or prose
        words = line.split()
    call: list[str] | None = None
    for word in [*words, ";"]:
        if word.startswith((";", "|", "&", ")", ">", "<")):
            if call:
                yield call
            call = None
        elif word == "virt-sse":
            call = []
        elif call is not None:
            call.append(word)


def _unknown(call: list[str], root: CommandReference) -> bool:
    command, rest = root, call
    while command.commands and rest and re.fullmatch(r"[a-z][a-z-]*", rest[0]):
        inner = command.find(rest[0])
        if inner is None:
            return True
        command, rest = inner, rest[1:]
    known = _ANYWHERE.union(*(each.names for each in command.parameters))
    options = [each.partition("=")[0] for each in rest if re.match(r"--[a-z]|-[a-z]$", each)]
    return not command.commands and not known.issuperset(options)

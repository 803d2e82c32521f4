"""Fuzzing of parsers of foreign bytes: the contract that each parser holds, and mutation of valid inputs.

A parser returns a value or raises an error of its own, in bounded time and memory, whatever the bytes are.
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import resource
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from virt_sse.errors import VirtSseError

Parse = Callable[[bytes], object]
Opened = Callable[[Path], AbstractContextManager[Parse]]

SLOWEST = 3.0
"""CPU seconds for an input; fuzzed inputs are short."""
LONGEST_MESSAGE = 4096
MEMORY = 2 << 30
"""Bytes of address space for all parsers of a process, on top of the process's own."""


@dataclass(frozen=True, slots=True)
class Parser:
    """A parser of foreign bytes.

    :ivar opened: context of the parser; its parameter is an empty folder.
    :ivar seeds: valid inputs.
    :ivar refusals: the parser's own errors.
    :ivar words: pieces of the format, for the mutation to insert.
    :ivar document: whether the seeds are JSON with perhaps bytes around, to change a value in.
    """

    name: str
    opened: Opened
    seeds: Sequence[bytes]
    refusals: tuple[type[Exception], ...] = (VirtSseError,)
    words: Sequence[bytes] = ()
    document: bool = False


def always(parse: Parse) -> Opened:
    """The context of a parser that needs no folder."""
    return lambda _folder: contextlib.nullcontext(parse)


def texts(parse: Callable[[str], object]) -> Opened:
    """As :func:`always`, for a parser of text; bytes other than UTF-8 become surrogates, as in arguments."""
    return always(lambda content: parse(content.decode(errors="surrogateescape")))


def require_contract(parser: Parser, parse: Parse, content: bytes) -> bool:
    """Check the contract for *content*; returns whether *content* was accepted.

    :raise AssertionError: When the input takes too long, or the error's message is unfit for a terminal.
    :raise Exception: When *parse* raises another error than its own.
    """
    began = time.process_time()
    message = None
    try:
        parse(content)
    except parser.refusals as exc:
        message = str(exc)
    if message is not None:
        assert message.isprintable(), f"a message with control characters: {message!r}"
        assert 0 < len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters"
    seconds = time.process_time() - began
    assert seconds < SLOWEST, f"took {seconds:.1f} s of CPU"
    return message is None


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Limit the memory of this process: beyond, an allocation raises :exc:`MemoryError`."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def inputs(parser: Parser) -> st.SearchStrategy[bytes]:
    """Mutations of the seeds, and at times bytes without any form."""
    kinds = [_mutated(parser), _mutated(parser), _mutated(parser), st.binary(max_size=256)]
    if parser.document:
        kinds += [_document(parser)] * 3
    if any(b"</" in content for content in parser.seeds):
        kinds += [_markup(parser)] * 3
    return st.one_of(kinds)


_VALUES = st.one_of(
    st.sampled_from((None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, 1.5, 1e308, float("inf"))),
    st.sampled_from(
        ("", "\0", "\ud800", "\x1b[2J", "a\nb", "../..", "x" * 5000, "\u0661", [], {}, [[]], {"": {}})
    ),
    st.recursive(st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)


@st.composite
def _document(draw: st.DrawFn, parser: Parser) -> bytes:
    """A seed with values of its JSON replaced, removed or moved."""
    content = draw(st.sampled_from(parser.seeds))
    start = min((at for at in (content.find(b"{"), content.find(b"[")) if at >= 0), default=0)
    end = max(content.rfind(b"}"), content.rfind(b"]")) + 1
    try:
        document = json.loads(content[start:end])
    except ValueError:
        return content
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        if not places:
            break
        parent, name = draw(st.sampled_from(places))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del parent[name]
        elif kind == 1:
            other, place = draw(st.sampled_from(places))
            parent[name] = copy.deepcopy(other[place])
        else:
            parent[name] = copy.deepcopy(draw(_VALUES))
    changed = json.dumps(document, separators=(",", ":")).encode()
    return content[:start] + changed + content[end:]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All values within a document, each as its parent, and its name or number there."""
    names = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for name in names:
        yield value, name
        yield from _places(value[name])


_MARKUP = re.compile(rb"=(['\"])(.*?)\1|>([^<>]+)<|<[^<>]*>")
_TEXTS = (
    *("", "virt-sse:", "virt-sse:x:y", "0" * 400, "-1", "\u0661", "&#27;", "&#xD7FF;", "../..", "a" * 9000),
    *("/a", "on", "file", "\udcff", "none", "9" * 30),
)


@st.composite
def _markup(draw: st.DrawFn, parser: Parser) -> bytes:
    """A seed with values of attributes and texts of its XML replaced, and elements removed or repeated."""
    content = draw(st.sampled_from(parser.seeds))
    for _ in range(draw(st.integers(1, 3))):
        places = list(_MARKUP.finditer(content))
        if not places:
            break
        place = draw(st.sampled_from(places))
        if place[0].startswith(b"<"):
            new = place[0] * draw(st.sampled_from((0, 2)))
            content = content[: place.start()] + new + content[place.end() :]
        else:
            group = 2 if place[2] is not None else 3
            text = draw(st.sampled_from(_TEXTS)).encode(errors="surrogateescape")
            content = content[: place.start(group)] + text + content[place.end(group) :]
    return content


_LAYOUTS = ("B", ">H", "<H", ">I", "<I", ">Q", "<Q")
_WORDS = (
    b"",
    b"\0",
    b"\n",
    b"\x1b[2J",
    b"\xff",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"\\u0000",
    b"1e999",
    b"NaN",
    b"null",
)
_NUMBERS = (b"0", b"-1", b"18446744073709551616", b"9" * 400, b"\xd9\xa1", b"1_0", b"1.5")


@st.composite
def _mutated(draw: st.DrawFn, parser: Parser) -> bytes:
    content = bytearray(draw(st.sampled_from(parser.seeds)))
    for _ in range(draw(st.integers(1, 6))):
        _change(draw, parser, content)
    return bytes(content)


def _change(draw: st.DrawFn, parser: Parser, content: bytearray) -> None:
    kind = draw(st.integers(0, 9))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    length = draw(st.integers(0, 16))
    if kind == 0 and content:
        content[at] ^= 1 << draw(st.integers(0, 7))
    elif kind == 1 and content:
        content[at] = draw(st.integers(0, 255))
    elif kind == 2:
        del content[at:]
    elif kind == 3:
        del content[at : at + length]
    elif kind == 4:
        content[at:at] = draw(st.binary(max_size=16))
    elif kind == 5:
        words = (*parser.words, *_WORDS)
        content[at : at + length] = draw(st.sampled_from(words))
    elif kind == 6:
        other = draw(st.sampled_from(parser.seeds))
        start = draw(st.integers(0, len(other)))
        content[at:] = other[start:]
    elif kind == 7:
        content[at:at] = content[at : at + length] * draw(st.sampled_from((1, 2, 300)))
    elif kind == 8:
        _number_in_text(draw, content)
    else:
        _number_in_bytes(draw, content, at)


def _number_in_bytes(draw: st.DrawFn, content: bytearray, at: int) -> None:
    layout = draw(st.sampled_from(_LAYOUTS))
    size = struct.calcsize(layout)
    at -= at % draw(st.sampled_from((1, size)))
    if at + size > len(content):
        return
    (before,) = struct.unpack_from(layout, content, at)
    most = (1 << 8 * size) - 1
    value = draw(st.sampled_from((0, 1, most, most - 1, most >> 1, (most >> 1) + 1, before + 1, before - 1)))
    struct.pack_into(layout, content, at, value & most)


def _number_in_text(draw: st.DrawFn, content: bytearray) -> None:
    places = [place for place, byte in enumerate(content) if 0x30 <= byte <= 0x39]
    if places:
        at = draw(st.sampled_from(places))
        content[at : at + draw(st.sampled_from((1, 4)))] = draw(st.sampled_from(_NUMBERS))

"""Tables that fit a terminal: display widths of characters, and texts shortened in the middle."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

_GAP = 2
_LEAST = 8
"""Columns, and parts of paths, that are shortened keep so many characters."""
_ELLIPSIS = "…"
_INVISIBLE = ("Mn", "Me", "Cf")
"""Categories of characters that take no place of their own: combining marks, format characters."""


def format_table(lines: Sequence[Sequence[str]], width: int | None) -> Iterator[str]:
    """Yield the lines of a table with aligned columns.

    Of cells too wide for *width*, the longest are shortened in the middle; the first column, the name in most
    tables, comes last. A table with very many columns can stay wider than *width*.

    :param lines: the cells of each line, the headings first; without control characters.
    :param width: characters of a line; ``None`` for any number.
    """
    widths = [max(map(display_width, column)) for column in zip(*lines, strict=True)]
    if width is not None:
        first, *others = widths
        room = width - _GAP * len(others)
        others = _fit(others, room - first, _LEAST)
        widths = [*_fit([first], room - sum(others), _LEAST), *others]
    for line in lines:
        cells = (shorten(cell, most) for cell, most in zip(line, widths, strict=True))
        padded = (cell + " " * (most - display_width(cell)) for cell, most in zip(cells, widths, strict=True))
        yield (" " * _GAP).join(padded).rstrip()


def display_width(text: str) -> int:
    """The number of columns that *text* takes on a terminal (Unicode Standard Annex #11)."""
    return len(text) if text.isascii() else sum(map(_character_width, text))


def _character_width(character: str) -> int:
    if unicodedata.category(character) in _INVISIBLE:
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, most: int) -> str:
    """*text* within *most* columns of a terminal.

    A path keeps its last part, and loses folders before it. Of a URL or key, the longest parts are shortened:
    a name between a host and a key's version stays readable.
    """
    if display_width(text) <= most:
        return text
    if text.startswith("/"):
        return _short_path(text, most)
    parts = re.split(r"([/:]+)", text)
    room = most - sum(map(display_width, parts[1::2]))
    lengths = _fit([display_width(part) for part in parts[::2]], room, _LEAST)
    if sum(lengths) > room:
        return _middle_out(text, most)
    parts[::2] = [_middle_out(part, length) for part, length in zip(parts[::2], lengths, strict=True)]
    return "".join(parts)


def _short_path(path: str, most: int) -> str:
    *folders, name = path.split("/")
    while folders:
        folders.pop()
        short = "/".join([*folders, _ELLIPSIS, name])
        if display_width(short) <= most:
            return short
    return _middle_out(path, most)


def _middle_out(text: str, most: int) -> str:
    """*text* within *most* columns: beginning and end, with an ellipsis between."""
    if display_width(text) <= most:
        return text
    groups = _groups(text)
    end = _take(groups[::-1], (most - 1) // 2)
    start = _take(groups, most - 1 - sum(map(display_width, end)))
    return "".join(start) + _ELLIPSIS + "".join(end[::-1])


def _groups(text: str) -> list[str]:
    """The characters of *text*, each with the combining characters behind it."""
    groups: list[str] = []
    for character in text:
        if groups and _character_width(character) == 0:
            groups[-1] += character
        else:
            groups.append(character)
    return groups


def _take(groups: Sequence[str], most: int) -> list[str]:
    taken: list[str] = []
    for group in groups:
        most -= display_width(group)
        if most < 0:
            break
        taken.append(group)
    return taken


def _fit(widths: Sequence[int], room: int, least: int) -> list[int]:
    """Reduce the largest of *widths* to a common width until their sum is at most *room*.

    No width above *least* gets below *least*: the sum can stay above *room*.
    """
    level = max(widths, default=0)
    while level > least and sum(min(width, level) for width in widths) > room:
        level -= 1
    fitted = [min(width, level) for width in widths]
    spare = room - sum(fitted)
    for index, width in enumerate(widths):  # what is left over by the common width
        if spare > 0 and width > fitted[index]:
            fitted[index] += 1
            spare -= 1
    return fitted

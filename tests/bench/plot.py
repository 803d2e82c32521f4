"""The figures with a target as a picture: SVG, a bar per figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _LEFT, _BAR, _LINE, _TOP = 1100, 520, 420, 18, 64
_MOST = 1.5
"""A bar this many times the target fills its space."""
_MET, _MISSED, _INK = "#3a7d44", "#c0392b", "#222222"
_NUMBER_FORMATS = {"s": "{:.3g} s", "MiB/s": "{:.0f} MiB/s"}


def svg(document: Mapping[str, Any]) -> str:
    """The picture of a results document: each bar is the part of the target that was reached."""
    rows = [row for row in document["rows"] if row["target"]]
    machine = document["machine"]
    height = _TOP + _LINE * len(rows) + 30
    aim = _LEFT + _BAR / _MOST
    title = f"virt-sse {document['version']}, {document['began'][:10]}"
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, QEMU {machine['qemu']},"
        f" {machine['file_system']}, load {machine['load_average']:.1f} at the start"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        _text(10, 20, title, size=15),
        _text(10, 38, where),
        _text(aim, _TOP - 8, "target", anchor="middle"),
        *(part for number, row in enumerate(rows) for part in _bar(row, _TOP + _LINE * number)),
        f'<line x1="{aim}" y1="{_TOP - 4}" x2="{aim}" y2="{height - 26}" stroke="{_INK}"/>',
        _text(
            10, height - 10, "Bars to the right of the line meet their target. Medians; ratios to the peer."
        ),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bar(row: Mapping[str, Any], top: float) -> Sequence[str]:
    reached = _reached(row)
    length = _BAR * min(reached, _MOST) / _MOST
    colour = _MET if row["met"] else _MISSED
    return (
        _text(_LEFT - 8, top + 12, row["what"], anchor="end"),
        f'<rect x="{_LEFT}" y="{top + 2}" width="{length:.1f}" height="{_LINE - 5}" fill="{colour}"/>',
        _text(_LEFT + _BAR + 8, top + 12, _figure(row)),
    )


def _reached(row: Mapping[str, Any]) -> float:
    """The part of the target that was reached; above 1 the target is met. Of two targets, the worse."""
    target = row["target"]
    parts = []
    if target["seconds"] is not None:
        parts.append(target["seconds"] / max(row["ours"]["value"], 1e-9))
    if target["ratio"] is not None:
        parts.append((row["ratio"] or 0) / target["ratio"])
    return float(min(parts))


def _figure(row: Mapping[str, Any]) -> str:
    target, ours = row["target"], row["ours"]
    if target["ratio"] is not None:
        return f"{row['ratio'] or 0:.2f}, target {target['ratio']:g}"
    measured = _NUMBER_FORMATS.get(ours["unit"], "{:.3g}").format(ours["value"])
    return f"{measured}, target {target['seconds']:.3g} s"


def _text(x: float, y: float, text: str, *, size: int = 11, anchor: str = "start") -> str:
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{_INK}">{escape(text)}</text>'
    )

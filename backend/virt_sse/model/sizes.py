"""Sizes as people write them: the scaled integers of virsh(1)."""

from __future__ import annotations

import re

from virt_sse.errors import InvalidValueError

_SIZE = re.compile(r"([0-9]{1,20})(?:([kmgtpe])(ib|b)?|b|bytes?)?", re.ASCII | re.IGNORECASE)
_PREFIXES = "kmgtpe"
_HINT = "a number of bytes, or a number with K, M, G or T (powers of 1024) or KB, MB, GB or TB (of 1000): 10G"


def parse_size(text: str) -> int:
    """Convert a size to bytes: ``10G``, ``10g`` and ``10GiB`` are the same, ``10GB`` is 10 · 1000³ bytes.

    The suffixes are those of virsh: none, ``b`` or ``bytes`` for bytes; ``K``, ``M``, ``G``, ``T``, ``P`` and
    ``E``, alone or with ``iB``, for powers of 1024; with ``B``, for powers of 1000. Case does not matter.

    :raise InvalidValueError: When *text* is malformed, or the size is zero or 2⁶³ and more.
    """
    match = _SIZE.fullmatch(text)
    if not match:
        raise InvalidValueError(f"invalid size {text[:40]!r}", hint=_HINT)
    prefix, unit = match[2], match[3]
    base = 1000 if unit and unit.lower() == "b" else 1024
    size: int = int(match[1]) * base ** (_PREFIXES.index(prefix.lower()) + 1 if prefix else 0)
    if not 0 < size < 1 << 63:
        raise InvalidValueError(f"invalid size {text[:40]!r}", hint="a size above 0, below 8 EiB")
    return size

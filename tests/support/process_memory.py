"""Search of a process's memory."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

_CHUNK = 16 << 20


def found_in_memory(pid: int, needles: Sequence[bytes]) -> list[bytes]:
    """The *needles* in the writable memory of a process, the memory of its guest included."""
    found = set()
    overlap = max(map(len, needles))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            span, rights, *_ = line.split()
            if not rights.startswith("rw"):
                continue
            begin, end = (int(text, 16) for text in span.split("-"))
            for offset in range(begin, end, _CHUNK):
                with contextlib.suppress(OSError):  # released meanwhile
                    memory.seek(offset)
                    content = memory.read(min(_CHUNK + overlap, end - offset))
                    found |= {needle for needle in needles if needle in content}
    return [needle for needle in needles if needle in found]

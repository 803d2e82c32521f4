"""The lab's cache between runs: built guests, libvirt's capabilities of QEMU, results of acceleration probes.

The cache can be deleted at any time; the next run fills it again.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from virt_sse.lab.limits import wait_until

_LOCK_SECONDS = 1000.0


def cache_directory() -> Path:
    """Make the cache directory: ``VIRT_SSE_LAB_CACHE``, or ``virt-sse/lab`` in the XDG cache directory."""
    chosen = os.environ.get("VIRT_SSE_LAB_CACHE")
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    directory = Path(chosen) if chosen else xdg / "virt-sse/lab"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Lock the cache entry *name*: one process at a time may use it, further processes wait.

    :raise LabError: When another process uses the entry for longer than a build takes.
    """
    path = cache_directory() / f"{name}.lock"
    with path.open("w") as file:
        wait_until(lambda: _try_lock(file), f"the process that holds {path}", _LOCK_SECONDS)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def replace(path: Path, content: bytes) -> None:
    """Write *path* atomically: readers see either the old or the new content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:  # noqa: PTH123 -- a descriptor
            file.write(content)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink()
        raise

"""The copy of a disk without a running domain, by confined tools, and its comparison."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from virt_sse.errors import CopyCancelledError, CopyInterruptedError, ImageError
from virt_sse.keys.host import Host
from virt_sse.model.replacements import Replacement
from virt_sse.qemu import conversion, image_file, img
from virt_sse.system.progress import Progress, silent

Bars = Callable[[str], AbstractContextManager[Progress]]
"""Makes the progress bar of a part of a copy, by its name."""

_CANCEL_SECONDS = 1.0
"""Interval of the queries whether the copy is to be undone."""


def no_bars(_what: str) -> AbstractContextManager[Progress]:
    """Progress bars without output; see :data:`Bars`."""
    return nullcontext(silent)


def copy_offline(
    host: Host, copy: Replacement, source: conversion.CopySource, bars: Bars, stopping: threading.Event | None
) -> None:
    """Copy the content of *source* into the new disk, durably, and compare both.

    :param stopping: set to leave the copy to the next process, which begins again.
    :raise CopyCancelledError: When the copy is to be undone.
    :raise CopyInterruptedError: When this process stops.
    :raise DiskInUseError: When a QEMU process has an image open.
    :raise ImageError: When there is no room, or the source was changed meanwhile.
    :raise VirtSseError: By meaning.
    """
    new = host.store.get(str(copy.disk_id))
    deks = host.keys.unwrap_all(new)
    with bars("copying") as progress:
        watched = _watching(host, copy, progress, stopping)
        conversion.copy_into(source, new.path, new.format, deks, watched, max_rate=copy.max_rate)
        with image_file.opened(new.path, os.O_RDWR) as descriptor:
            os.fsync(descriptor)
    with bars("comparing") as progress:
        conversion.compare(source, new.path, new.format, deks, _watching(host, copy, progress, stopping))
    if img.usable_size_within(new.path, new.format, deks) != new.size:
        raise ImageError(f"{new.path} has another size than the disk before")


def _watching(
    host: Host, copy: Replacement, progress: Progress, stopping: threading.Event | None
) -> Progress:
    """*progress*, with a query whether the copy is to be undone."""
    due = 0.0

    def watched(fraction: float) -> None:
        nonlocal due
        progress(fraction)
        if stopping is not None and stopping.is_set():
            raise CopyInterruptedError(f"the copy of disk {copy.name!r} goes on without this process")
        if time.monotonic() >= due:
            record = host.store.replacements.find(copy.disk_id)
            if record is None or record.is_cancelled:
                raise CopyCancelledError(f"the copy of disk {copy.name!r} was cancelled")
            due = time.monotonic() + _CANCEL_SECONDS

    return watched

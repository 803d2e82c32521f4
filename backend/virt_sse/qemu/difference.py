"""The difference of two contents, written into an encrypted image that lacks what is the same in both."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from virt_sse.errors import ImageError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu.conversion import CopySource
from virt_sse.qemu.img import locks_named, working_limits
from virt_sse.qemu.nbd import NbdReader
from virt_sse.qemu.serving import served, served_for_writing
from virt_sse.qemu.unlocking import block_node, keys_to

CLUSTER = 64 << 10
"""Bytes of a cluster of qcow2 images made by virt-sse: parts of a cluster are not told apart."""
_AT_ONCE = 4 << 20


def write_difference(
    source: CopySource,
    base: CopySource,
    target: Path,
    deks: Sequence[Dek],
    progress: Callable[[float], None],
) -> int:
    """Write each cluster of *source* that differs from *base* into the new, empty qcow2 image *target*.

    The contents are compared in the memory of this process. Each daemon that opens an image serves it on a
    socket without a name, to this process alone.

    :param base: content of any size; reads as zero beyond its end.
    :param target: of the size of *source*.
    :param progress: called with the completed fraction, from 0.0 to 1.0.
    :return: number of bytes that differ, in whole clusters.
    :raise DiskInUseError: When a QEMU process is writing to an image.
    :raise ImageError: When an image cannot be read, sizes differ, or there is no room.
    :raise ToolError: When an image does not open.
    """
    differing = 0
    with (
        _reading(source) as new,
        _reading(base) as old,
        keys_to(target, DiskFormat.QCOW2, deks, writable=True) as keys,
        locks_named(target),
        served_for_writing(
            block_node(target, DiskFormat.QCOW2, len(deks)),
            keys.secrets,
            keys.descriptors,
            working_limits(new.size, keys.image),
        ) as written,
        ThreadPoolExecutor(1, "compare") as below,
    ):
        if written.size != new.size:
            raise ImageError(f"{target} has {written.size} bytes, and its content {new.size}")
        for offset in range(0, new.size, _AT_ONCE):
            reading = below.submit(_padded, old, offset, min(_AT_ONCE, new.size - offset))
            content = new.read(offset, _AT_ONCE)
            for begin, end in _differing(content, reading.result()):
                written.write(offset + begin, content[begin:end])
                differing += end - begin
            progress((offset + len(content)) / new.size)
        written.flush()
    return differing


@contextlib.contextmanager
def _reading(source: CopySource) -> Iterator[NbdReader]:
    assert source.image is not None  # noqa: S101 -- of the callers
    path, _ = source.image
    with source.opened() as (secrets, descriptors, files), locks_named(path):
        limits = working_limits(sum(file.path.stat().st_size for file in files), *files)
        with served(source.node, secrets, descriptors, files, shared=False, confinement=limits) as reader:
            yield reader


def _padded(reader: NbdReader, offset: int, length: int) -> bytes:
    """The content at *offset*; zero beyond the end."""
    return reader.read(offset, length).ljust(length, b"\0") if offset < reader.size else bytes(length)


def _differing(new: bytes, old: bytes) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of clusters that differ; clusters of zeros are runs of their own."""
    if new == old:
        return
    begin = None
    for offset in range(0, len(new), CLUSTER):
        cluster = new[offset : offset + CLUSTER]
        differs, is_zero = cluster != old[offset : offset + CLUSTER], not cluster.strip(b"\0")
        if begin is not None and (not differs or is_zero):
            yield begin, offset
            begin = None
        if differs and is_zero:
            yield offset, offset + len(cluster)
        elif differs and begin is None:
            begin = offset
    if begin is not None:
        yield begin, len(new)

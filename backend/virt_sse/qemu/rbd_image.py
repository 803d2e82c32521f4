"""Images in Ceph, as RBD images: raw LUKS volumes, whose header is read and written over the network.

librbd's exclusive lock passes from client to client on request, also between two guests. Therefore the
clients that have an image open for writing, its watchers, tell whether the image is in use; a client that has
died counts until its watch times out, after 30 s.

Sources: rbd(8), Ceph ``rbd-exclusive-locks``.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from virt_sse.errors import CephError, DiskExistsError, ImageError, ImageFormatError, ToolError
from virt_sse.qemu import ceph
from virt_sse.qemu.luks import HEADER_END, Luks1Header
from virt_sse.qemu.nbd import NbdReader, NbdWriter
from virt_sse.qemu.serving import served, served_for_writing
from virt_sse.system.confinement import Confinement
from virt_sse.system.files import length, write_at
from virt_sse.system.rbd_names import RbdName

_FEATURES = "layering,exclusive-lock,object-map,fast-diff,deep-flatten"
_LOCK_FEATURE = "exclusive-lock"
_HEADER_AT_MOST = 4 << 20
"""Bound for the LUKS header with its keyslots; further bytes of an image are not read here."""
_PAGE, _AT_ONCE = 4096, 1 << 20
"""Bytes of a page, the first of which has the LUKS fields and the envelope; and of a write to a new image."""
_SHORT_USE_SECONDS, _POLL_SECONDS = 2.0, 0.2
"""Another command of virt-sse has the image open for less."""
_CONFINEMENT = Confinement(network=True, cpu_seconds=600, memory=4 << 30)


class Header:
    """The first bytes of an image, in a file in memory that is as long as the image.

    :ivar descriptor: of the file; bytes beyond the LUKS header and its keyslots are zeros.
    """

    def __init__(self, name: RbdName, descriptor: int) -> None:
        self._name = name
        self.descriptor = descriptor
        with _opened_for_reading(name) as image:
            content = image.read(0, _PAGE)
            with contextlib.suppress(ImageFormatError):
                end = min(Luks1Header.parse(content[:HEADER_END]).payload_offset, _HEADER_AT_MOST)
                content += image.read(_PAGE, max(end - _PAGE, 0))
            os.ftruncate(descriptor, image.size)
        write_at(descriptor, content, 0)
        self._stored = content

    def write_back(self) -> None:
        """Write what has changed since, durably; the first page last.

        The page is within one object of the image, whose writes are never torn.

        :raise ImageError: When the image cannot be written.
        """
        end = min(length(self.descriptor), _HEADER_AT_MOST)
        content = os.pread(self.descriptor, end, 0)
        with _opened_for_writing(self._name) as image:
            for run in reversed(_changed(self._stored.ljust(end, b"\0"), content)):
                image.write(run.start, content[run])
                image.flush()
        self._stored = content


def _changed(before: bytes, after: bytes) -> list[slice]:
    """The runs of changed pages, the first page apart: what was not read, e.g. data, must not be written."""
    runs: list[slice] = []
    for begin in range(0, len(after), _PAGE):
        end = min(begin + _PAGE, len(after))
        if before[begin:end] == after[begin:end]:
            continue
        if runs and begin > _PAGE and runs[-1].stop == begin:
            runs[-1] = slice(runs[-1].start, end)
        else:
            runs.append(slice(begin, end))
    return runs


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Header]:
    """Read the LUKS header of an image.

    :raise ImageError: When the image is missing.
    :raise CephError: When the cluster does not answer.
    """
    descriptor = os.memfd_create("rbd-header")
    try:
        yield Header(RbdName.of(path), descriptor)
    finally:
        os.close(descriptor)


def make(path: Path, content: int, size: int) -> None:
    """Make the new image *path* of *size* bytes, that begins with the bytes of the file *content*.

    :raise DiskExistsError: When the image exists.
    :raise CephError: When the cluster does not answer, or refuses.
    """
    name = RbdName.of(path)
    _rbd(path, ["create", "--size", f"{size}B", "--image-feature", _FEATURES, str(name)])
    with _opened_for_writing(name) as image:
        end = length(content)
        for begin in range(0, end, _AT_ONCE):
            image.write(begin, os.pread(content, min(_AT_ONCE, end - begin), begin))
        image.flush()


def exists(path: Path) -> bool:
    """Whether the image exists.

    :raise CephError: When the cluster does not answer.
    """
    try:
        _has_watchers(path)
    except ImageError:
        return False
    return True


def rename(path: Path, target: Path) -> None:
    """Give the image the new name *target* in its pool.

    :raise DiskExistsError: When the name is taken.
    :raise ImageError: When the image is missing.
    """
    _rbd(target, ["rename", str(RbdName.of(path)), str(RbdName.of(target))])


def remove(path: Path) -> None:
    """Remove the image; a missing image is not an error.

    :raise CephError: When the image is open, or the cluster does not answer.
    """
    with contextlib.suppress(ImageError):
        _rbd(path, ["rm", "--no-progress", str(RbdName.of(path))])


def is_open(path: Path) -> bool:
    """Whether a client has the image open for writing for more than a moment.

    :raise ImageError: When the image is missing.
    :raise CephError: When the cluster does not answer.
    """
    deadline = time.monotonic() + _SHORT_USE_SECONDS
    while _has_watchers(path):
        if time.monotonic() > deadline:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def refuse_without_lock(path: Path) -> None:
    """Refuse an image without librbd's exclusive lock: two clients could write at the same time.

    :raise ImageError: When the image is missing, or lacks the feature.
    """
    if _LOCK_FEATURE not in _answer(path, ["info", "--format", "json", str(RbdName.of(path))], "features"):
        raise ImageError(
            f"{path} lacks the feature {_LOCK_FEATURE}",
            hint=f"run 'rbd feature enable {RbdName.of(path)} {_LOCK_FEATURE}'",
        )


def _has_watchers(path: Path) -> bool:
    return bool(_answer(path, ["status", "--format", "json", str(RbdName.of(path))], "watchers"))


def _answer(path: Path, arguments: list[str], field: str) -> list[object]:
    """A list in the answer of rbd(8). Without msgspec, which hand-overs of disks do not have."""
    answer = _rbd(path, arguments)
    try:
        return list(json.loads(answer)[field])
    except (ValueError, TypeError, KeyError) as exc:
        raise CephError(f"rbd describes {path} in an unknown format") from exc


def _rbd(path: Path, arguments: list[str]) -> str:
    """Run rbd(8).

    :param path: the image that may be missing, or be there already.
    """
    with _image_errors(path):
        return ceph.rbd(arguments)


@contextlib.contextmanager
def _opened_for_reading(name: RbdName) -> Iterator[NbdReader]:
    with (
        _image_errors(name.path),
        ceph.secret() as (secrets, descriptors),
        served(ceph.node(name), secrets, descriptors, [], confinement=_CONFINEMENT) as image,
    ):
        yield image


@contextlib.contextmanager
def _opened_for_writing(name: RbdName) -> Iterator[NbdWriter]:
    with (
        _image_errors(name.path),
        ceph.secret() as (secrets, descriptors),
        served_for_writing(ceph.node(name), secrets, descriptors, _CONFINEMENT) as image,
    ):
        yield image


@contextlib.contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    """Tell errors about the image *path* from those of the cluster.

    :raise ImageError: When the image is missing.
    :raise DiskExistsError: When the image exists already.
    :raise CephError: When the cluster does not answer, or refuses.
    """
    try:
        yield
    except (CephError, ImageError, ToolError) as exc:
        if "No such file or directory" in str(exc):
            missing = f"the pool of {path}" if "error opening pool" in str(exc) else f"image {path}"
            raise ImageError(f"{missing} is missing") from exc
        if "(17) File exists" in str(exc):
            raise DiskExistsError(f"{path} exists already") from exc
        if isinstance(exc, CephError):
            raise
        raise CephError(f"cannot reach {path}: {exc}", hint="see 'ceph status'") from exc

"""Backing chains of plaintext images, opened and stated as a whole before a tool reads any of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import DiskInUseError, ImageFormatError, OtherFileError
from virt_sse.qemu import conversion, image_file, img
from virt_sse.system.confinement import BoundFile
from virt_sse.system.files import canonical

_FORMATS = ("raw", "qcow2")
_LONGEST = 64
_FLOCK = struct.Struct("hhqqi4x")
_NO_WRITERS = 201
"""QEMU locks this byte to exclude writers (``RAW_LOCK_SHARED_BASE`` and the bit of ``BLK_PERM_WRITE``)."""


@dataclass(frozen=True, slots=True)
class BackingChain:
    """A plaintext image with its backing files.

    :ivar source: the whole chain, for a copy.
    :ivar size: of the guest's disk, in bytes.
    :ivar paths: the image first.
    """

    source: conversion.CopySource
    size: int
    paths: tuple[Path, ...]

    def identity(self) -> list[tuple[int, ...]]:
        """Properties of the files under these paths that change with their content.

        :raise ImageError: When a file is missing.
        """
        found = []
        for path in self.paths:
            with image_file.held(path) as descriptor:
                found.append(os.fstat(descriptor))
        return [(each.st_dev, each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


@contextlib.contextmanager
def opened_chain(path: Path, image_format: str, *, shared: bool = False) -> Iterator[BackingChain]:
    """Open an image and its backing files, and keep QEMU processes from writing to the image meanwhile.

    :param image_format: QEMU's name of the format: ``raw`` or ``qcow2``.
    :param shared: allow processes that write to the image.
    :raise DiskInUseError: When a QEMU process may write to the image.
    :raise ImageFormatError: When the chain has a loop, a missing file, an external data file, an encrypted
        image, or an image whose format is not stated.
    :raise ImageError: When a file cannot be read.
    :raise ToolError: When an image is not in its format.
    """
    with contextlib.ExitStack() as stack:
        files: list[BoundFile] = []
        layers: list[dict[str, object]] = []
        size = 0
        pending: tuple[Path, str | None] | None = (path, image_format)
        while pending is not None:
            present, stated = pending
            if any(canonical(present) == canonical(file.path) for file in files) or len(files) >= _LONGEST:
                raise ImageFormatError(f"the backing files of {path} form a loop, at {present}")
            if stated not in _FORMATS:
                raise ImageFormatError(
                    f"the format of {present} is {stated or 'not stated'}",
                    hint=f"supported: {', '.join(_FORMATS)}; 'qemu-img rebase -u -F FORMAT' states a format",
                )
            descriptor = stack.enter_context(image_file.held(present))
            if not files and not shared:
                stack.enter_context(_without_writers(present))
            try:
                found = img.info(present, stated, descriptor=descriptor, shared=shared)
            except OtherFileError as exc:
                raise ImageFormatError(f"{present} refers to another file, {exc.name}") from exc
            data = [other for other in found.other_files if other != found.backing_file]
            if found.encrypted or data:
                reason = "is encrypted" if found.encrypted else f"has an external data file, {data[0]}"
                raise ImageFormatError(f"{present} {reason}")
            size = size or found.virtual_size
            file = {"driver": image_file.file_driver(descriptor), "filename": str(present)}
            layers.append({"driver": stated, "file": file})
            files.append(BoundFile(present, descriptor))
            pending = None
            if found.backing_file is not None:
                if not found.backing_file.startswith("/"):
                    raise ImageFormatError(f"{present} refers to {found.backing_file}, no file of this host")
                if not os.path.lexists(found.backing_file):
                    raise ImageFormatError(f"backing file {found.backing_file} of {present} is missing")
                pending = (Path(found.backing_file), found.backing_format)
        node: dict[str, object] | None = None
        for layer in reversed(layers):
            node = layer | ({"backing": node} if layer["driver"] == "qcow2" else {})
        assert node is not None  # noqa: S101 -- at least the image
        yield BackingChain(
            conversion.CopySource(node, tuple(files)), size, tuple(file.path for file in files)
        )


@contextlib.contextmanager
def _without_writers(path: Path) -> Iterator[None]:
    """Take QEMU's lock that no other process may write to the image.

    :raise DiskInUseError: When a process may write already.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        image_file.refuse_if_locked(path, descriptor)
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, _NO_WRITERS, 1, 0))
        yield
    except BlockingIOError as exc:
        raise DiskInUseError(f"{path} is in use by a running domain or another QEMU process") from exc
    finally:
        os.close(descriptor)

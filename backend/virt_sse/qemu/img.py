"""Images queried, resized and checked with qemu-img and qemu-io."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from virt_sse.errors import DiskInUseError, ImageFormatError, OtherFileError, ToolError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import qcow2
from virt_sse.qemu.image_file import held, opened, refuse_if_open, usable_size
from virt_sse.qemu.unlocking import BaseImage, json_filename, keys_to
from virt_sse.system.confinement import BoundFile, Confinement
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.tools import run

_NOT_OPENED = re.compile(r"Could not open '(.*?)': (?:No such file or directory|Permission denied)")

_MOST_FILES = 256
"""Upper bound for a chain of backing files."""

_MEMORY_OF_IMAGE = 64 << 20
"""Bytes for the tables of one image, with two volumes, in a chain (QEMU ``docs/qcow2-cache.txt``)."""

_QUERY_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Properties of an image according to ``qemu-img info``; sizes in bytes.

    :ivar other_files: further files with content of the image: backing file, data file, extents.
    :ivar backing_file: the backing file among them.
    :ivar backing_format: format of the backing file, as stated by the image.
    """

    format: str
    virtual_size: int
    encrypted: bool
    other_files: tuple[str, ...]
    backing_file: str | None = None
    backing_format: str | None = None


class _Extent(msgspec.Struct, frozen=True):
    filename: str | None = None


class _Details(msgspec.Struct, frozen=True, rename="kebab"):
    data_file: str | None = None
    extents: tuple[_Extent, ...] = ()


class _Specific(msgspec.Struct, frozen=True):
    data: _Details = _Details()


class _Info(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """The answer of ``qemu-img info`` (QEMU ``qapi/block-core.json``, ``ImageInfo``)."""

    format: str
    virtual_size: Annotated[int, msgspec.Meta(ge=0)]
    encrypted: bool = False
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_filename_format: str | None = None
    format_specific: _Specific = _Specific()


def info(
    path: Path,
    image_format: str | None = None,
    *,
    shared: bool = False,
    descriptor: int | None = None,
    others: Iterable[BoundFile] = (),
) -> ImageInfo:
    """Query any image with ``qemu-img info``; *image_format* is probed unless given.

    :param shared: allow an image that a QEMU process has open for writing.
    :param descriptor: descriptor of the image, if already open.
    :param others: further files that the image may name.
    :raise DiskInUseError: When a QEMU process has the image open for writing.
    :raise ImageError: When *path* cannot be opened, or is neither a file nor a block device.
    :raise OtherFileError: When the image cannot be read without a file that is not in *others*.
    :raise ToolError: When the image cannot be read as *image_format*.
    """
    if descriptor is None:
        with held(path) as found:
            return info(path, image_format, shared=shared, descriptor=found, others=others)
    chosen = (["-f", image_format] if image_format else []) + (["--force-share"] if shared else [])
    with locks_named(path), _others_named(path):
        answer = run(
            ["qemu-img", "info", "--output=json", *chosen, str(path)],
            confinement=Confinement(files=[*others, BoundFile(path, descriptor)]),
            timeout=_QUERY_SECONDS,
        )
    return _image_info(answer, path)


def _image_info(answer: str, path: Path) -> ImageInfo:
    """Read the answer of ``qemu-img info`` for the image at *path*.

    :raise ToolError: When the answer is not of QEMU's schema.
    """
    try:
        found = from_json(answer.encode(), _Info)
    except DocumentError as exc:
        raise ToolError(f"qemu-img describes {path} in an unknown format: {exc}") from exc
    details = found.format_specific.data
    backing = found.full_backing_filename or found.backing_filename
    others = [backing, details.data_file, *(extent.filename for extent in details.extents)]
    return ImageInfo(
        format=found.format,
        virtual_size=found.virtual_size,
        encrypted=found.encrypted,
        other_files=tuple(other for other in others if other and other != str(path)),
        backing_file=backing,
        backing_format=found.backing_filename_format,
    )


@contextlib.contextmanager
def with_other_files(path: Path, image_format: str | None) -> Iterator[list[BoundFile]]:
    """Open all files that the image at *path* names: its backing chain, data files and extents.

    :raise ImageError: When the image names more than files and block devices of this host.
    """
    with contextlib.ExitStack() as stack:
        files: dict[str, BoundFile] = {}

        def add(name: str) -> None:
            if not name.startswith("/") or len(files) >= _MOST_FILES:
                reason = (
                    "too many files" if name.startswith("/") else f"{name}, which is no file of this host"
                )
                raise ImageFormatError(f"{path} refers to {reason}")
            files[name] = BoundFile(Path(name), stack.enter_context(held(Path(name))))

        pending: list[tuple[str, str | None]] = [(str(path), image_format)]
        while pending:
            name, own_format = pending.pop()
            try:
                found = info(Path(name), own_format, others=files.values())
            except OtherFileError as exc:
                if exc.name in files:
                    raise
                add(exc.name)
                pending.append((name, own_format))
                continue
            for other in set(found.other_files) - files.keys() - {str(path)}:
                add(other)
                if other == found.backing_file:
                    pending.append((other, None))
        yield list(files.values())


@contextlib.contextmanager
def _others_named(path: Path) -> Iterator[None]:
    """Turn QEMU's failure to open a file other than *path* into an :class:`OtherFileError`."""
    try:
        yield
    except ToolError as exc:
        others = [name for name in _NOT_OPENED.findall(str(exc)) if name != str(path)]
        if others:
            raise OtherFileError(others[-1]) from exc
        raise


@contextlib.contextmanager
def locks_named(path: Path) -> Iterator[None]:
    """Turn QEMU's refusal of a locked image into a :class:`DiskInUseError`."""
    try:
        yield
    except ToolError as exc:
        if "lock" in str(exc) and "Is another process using the image" in str(exc):
            raise DiskInUseError(f"{path} is in use by a running domain or another QEMU process") from exc
        raise


def working_limits(size: int, *files: BoundFile) -> Confinement:
    """Limits of a tool that reads or writes images of *size* bytes throughout: its tables grow with them."""
    return Confinement(
        files=files,
        memory=(2 << 30) + size // 1024 + len(files) * _MEMORY_OF_IMAGE,
        cpu_seconds=None,
        written=size + size // 8 + (64 << 20),
    )


def usable_size_within(path: Path, image_format: DiskFormat, deks: Sequence[Dek]) -> int:
    """The usable size, as seen by the guest, in bytes; for nested volumes too, and for an image in use.

    :raise ImageFormatError: When the image is damaged or *deks* do not unlock its volumes.
    """
    try:
        with keys_to(path, image_format, deks) as keys:
            answer = run(
                ["qemu-img", "info", "--output=json", "--force-share", *keys.secrets]
                + [json_filename(path, image_format, len(deks))],
                confinement=Confinement(files=[keys.image]),
                pass_fds=keys.descriptors,
                timeout=_QUERY_SECONDS,
            )
            return _image_info(answer, path).virtual_size
    except ToolError as exc:
        raise ImageFormatError(f"{path} does not open with its DEK: {exc}") from exc


def resize(
    path: Path,
    image_format: DiskFormat,
    size: int,
    deks: Sequence[Dek],
    *,
    shrink: bool,
    base: BaseImage | None = None,
) -> None:
    """Change the usable size of an unused image to *size* bytes.

    :param base: of a linked clone: where the base is longer than the clone was, growing writes zeros.
    :param shrink: allow a smaller size; data beyond the new end is lost.
    :raise DiskInUseError: When a QEMU process has the image open.
    """
    refuse_if_open(path)
    with opened(path) as descriptor:
        room = usable_size(descriptor, image_format)
    if len(deks) > 1 and image_format is DiskFormat.QCOW2:  # a raw outer volume grows with its content
        needed = qcow2.most_room(size)
        if needed > room:
            resize(path, image_format, needed, deks[-1:], shrink=False)
    with keys_to(path, image_format, deks, writable=True, base=base) as keys, locks_named(path):
        run(
            ["qemu-img", "resize", "-q", *keys.secrets, *(["--shrink"] if shrink else [])]
            + [json_filename(path, image_format, len(deks), base=base), str(size)],
            confinement=working_limits(max(room, qcow2.most_room(size)), *keys.files),
            pass_fds=keys.descriptors,
        )


def check(path: Path, image_format: DiskFormat, deks: Sequence[Dek]) -> None:
    """Check the consistency of an unused image, and that *deks* unlock its volumes.

    :raise ImageFormatError: When the image is damaged or does not open with *deks*.
    :raise DiskInUseError: When a QEMU process has the image open.
    """
    refuse_if_open(path)
    check_unlocks(path, image_format, deks)
    if image_format is DiskFormat.RAW:
        return  # nothing to check: a raw image has no metadata beyond its LUKS header
    for volume in range(len(deks)):
        opening = deks[volume:]
        try:
            with keys_to(path, image_format, opening) as keys, locks_named(path):
                run(
                    ["qemu-img", "check", "-q", *keys.secrets]
                    + [json_filename(path, image_format, len(opening))],
                    confinement=working_limits(path.stat().st_size, keys.image),
                    pass_fds=keys.descriptors,
                )
        except ToolError as exc:
            raise ImageFormatError(f"{path} is damaged: {exc}") from exc


def check_unlocks(path: Path, image_format: DiskFormat, deks: Sequence[Dek]) -> None:
    """Check that *deks* unlock the image, whether or not in use.

    :raise ImageFormatError: When the image is damaged or does not open with *deks*.
    """
    try:
        with keys_to(path, image_format, deks) as keys:
            run(
                ["qemu-io", "--read-only", "--force-share", *keys.secrets, "-c", "read -q 0 512"]
                + [json_filename(path, image_format, len(deks))],
                confinement=Confinement(files=[keys.image]),
                pass_fds=keys.descriptors,
                timeout=_QUERY_SECONDS,
            )
    except ToolError as exc:
        raise ImageFormatError(f"{path} does not open with its DEK: {exc}") from exc

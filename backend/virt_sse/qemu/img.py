"""LUKS-encrypted images: queried, converted, resized and erased with qemu-img.

Multiple LUKS volumes of an image are nested, each in the image's format. Volumes and their DEKs are always
listed from the guest's, innermost, to the outermost, whose header is in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

import msgspec

from virt_sse.errors import DiskInUseError, ImageError, ImageFormatError, OtherFileError, ToolError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import image_header, luks, qcow2
from virt_sse.qemu.serving import served
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.system.confinement import BoundFile, Confinement
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import write_at
from virt_sse.system.locks import is_locked
from virt_sse.system.tools import passphrase_descriptor, run, run_with_progress

_QEMU_LOCKS, _QEMU_LOCKS_LENGTH = 100, 200
_NOT_OPENED = re.compile(r"Could not open '(.*?)': (?:No such file or directory|Permission denied)")
_MOST_FILES = 256
"""Upper bound for a chain of backing files."""
_QUERY_SECONDS = 120.0
_STALLED_SECONDS, _SLOWEST = 600.0, 10 << 20
"""A conversion reports each percent: time for one, in addition to the time at this rate in bytes/s."""
_WITH_BACKING = ("qcow", "qcow2", "qed", "vmdk")
"""QEMU's drivers with the option ``backing``."""
_ERASED_AT_MOST = 4 << 20
"""Upper bound for a LUKS header with its keyslots, and so for the bytes to overwrite."""
_ERASED_AT_ONCE = 1 << 20


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
    with _locks_named(path), _others_named(path):
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
def _locks_named(path: Path) -> Iterator[None]:
    """Turn QEMU's refusal of a locked image into a :class:`DiskInUseError`."""
    try:
        yield
    except ToolError as exc:
        if "lock" in str(exc) and "Is another process using the image" in str(exc):
            raise DiskInUseError(f"{path} is in use by a running domain or another QEMU process") from exc
        raise


@contextlib.contextmanager
def secrets_for(deks: Sequence[Dek], *, first: int = 0) -> Iterator[tuple[list[str], list[int]]]:
    """Arguments and descriptors that define the secret objects ``dek0``, ``dek1``, … for a QEMU tool.

    :param first: number of the first secret object.
    """
    with contextlib.ExitStack() as stack:
        descriptors = [stack.enter_context(passphrase_descriptor(dek.passphrase)) for dek in deks]
        arguments = []
        for number, descriptor in enumerate(descriptors, first):
            arguments += ["--object", f"secret,id=dek{number},file=/proc/self/fd/{descriptor}"]
        yield arguments, descriptors


@dataclass(frozen=True, slots=True)
class Unlocking:
    """What a QEMU tool needs to open a validated image with its keys.

    :ivar secrets: arguments that define the secret objects.
    :ivar descriptors: descriptors of the secrets, to be inherited by the tool.
    :ivar image: the validated image, read-only for the tool.
    """

    secrets: list[str]
    descriptors: list[int]
    image: BoundFile


@contextlib.contextmanager
def keys_to(
    path: Path, image_format: DiskFormat, deks: Sequence[Dek], *, writable: bool = False, first: int = 0
) -> Iterator[Unlocking]:
    """As :func:`secrets_for`, after validating the headers of all volumes of the image at *path*.

    :param deks: of all volumes to be opened.
    :param writable: let the tool write to the image.
    :param first: number of the first secret.
    :raise ImageFormatError: When a header is missing, damaged or refused (:mod:`.image_header`).
    :raise ToolError: When the DEKs of outer volumes do not unlock these.
    """
    with contextlib.ExitStack() as stack:
        with opened(path) as descriptor:
            _validate_volumes(path, descriptor, image_format, deks[1:])
            held_open = os.dup(descriptor)
        stack.callback(os.close, held_open)
        secrets, descriptors = stack.enter_context(secrets_for(deks, first=first))
        yield Unlocking(secrets, descriptors, BoundFile(path, held_open, writable))


def _validate_volumes(
    path: Path, image: int, image_format: DiskFormat, outer: Sequence[Dek]
) -> tuple[VolumeHeader, ...]:
    """Validate the headers of all volumes of the open image.

    The header of an inner volume is ciphertext in the file. A storage daemon opens the volumes around it,
    read-only, once their own headers are validated.

    :param outer: DEKs of all volumes but the innermost.
    :return: the headers, innermost first.
    :raise: As :func:`keys_to`.
    """
    headers = [VolumeHeader.of_file(image, image_format)]
    for first in reversed(range(len(outer))):
        around = outer[first:]
        with (
            secrets_for(around) as (secrets, descriptors),
            served(
                block_node(path, image_format, len(around)), secrets, descriptors, [BoundFile(path, image)]
            ) as reader,
        ):
            try:
                headers.insert(0, VolumeHeader.of_content(reader.read, reader.size, image_format))
            except ImageFormatError as exc:
                raise ImageFormatError(f"{path}: in the inner layer: {exc}", hint=exc.hint) from exc
    return tuple(headers)


def validate(path: Path, image_format: DiskFormat, outer: Sequence[Dek]) -> tuple[VolumeHeader, ...]:
    """Validate the headers of all volumes of the image at *path*, e.g. before a guest gets the disk.

    The image may be in use.

    :param outer: DEKs of all volumes but the innermost.
    :return: the headers, innermost first.
    :raise ImageFormatError: When a header is missing, damaged or refused, or an outer volume does not open.
    """
    try:
        with opened(path) as image:
            return _validate_volumes(path, image, image_format, outer)
    except ToolError as exc:
        raise ImageFormatError(f"{path} does not open with its DEK: {exc}") from exc


def block_node(path: Path, image_format: DiskFormat, volumes: int, *, first: int = 0) -> dict[str, object]:
    """QEMU's description of the image at *path*, opened with the secrets of :func:`secrets_for`.

    The description has the whole block graph: QEMU must not take a backing file from a header.

    :param volumes: number of LUKS volumes to open, outermost first; below the image's number, the content of
        the opened node is ciphertext.
    :param first: number of the first secret.
    """
    node: dict[str, object] = {"driver": "file", "filename": str(path)}
    for number in reversed(range(first, first + volumes)):
        node = {"driver": image_format.qemu_driver, "file": node}
        if image_format is DiskFormat.QCOW2:
            node |= {"backing": None, "encrypt": {"format": "luks", "key-secret": f"dek{number}"}}
        else:
            node["key-secret"] = f"dek{number}"
    return node


def json_filename(path: Path, image_format: DiskFormat, volumes: int) -> str:
    """Encode :func:`block_node` as a file name for QEMU's tools (``json:``, qemu-block-drivers(7))."""
    return "json:" + json.dumps(block_node(path, image_format, volumes))


def image_options(path: Path, image_format: DiskFormat, volumes: int, *, first_secret: int = 0) -> str:
    """Options for ``--image-opts`` and ``--target-image-opts``, as :func:`block_node`, for new images.

    The syntax of options has no null, therefore no way to say that there is no backing file.

    :param first_secret: number of the secret of the innermost volume.
    """
    options = []
    for number in range(volumes):
        prefix = "file." * number
        options += [
            f"{prefix}driver={image_format.qemu_driver}",
            f"{prefix}{image_format.qemu_key_secret}=dek{first_secret + number}",
        ]
    prefix = "file." * volumes
    filename = str(path).replace(",", ",,")
    return ",".join([*options, f"{prefix}driver=file", f"{prefix}filename={filename}"])


def encrypt_from(
    source: Path,
    source_format: str,
    target: Path,
    target_format: DiskFormat,
    deks: Sequence[Dek],
    progress: Callable[[float], None],
    *,
    descriptor: int,
    others: Sequence[BoundFile] | None = None,
) -> None:
    """Write the content of the image *source* into the new encrypted image *target*, of the same size.

    :param progress: called with the completed fraction, from 0.0 to 1.0.
    :param descriptor: descriptor of the source.
    :param others: further files that the source may name, backing files included; by default none.
    :raise DiskInUseError: When a QEMU process is writing to *source*.
    :raise ImageError: When there is no room.
    :raise ToolError: When *source* cannot be read, or reading stalls.
    """
    zero = ["--target-is-zero"] if target_format is DiskFormat.QCOW2 else []
    opening = ["-f", source_format, str(source)]
    if others is None:
        opening = [f"json:{json.dumps(node_without_backing(source, descriptor, source_format))}"]
    with (
        secrets_for(deks) as (secrets, descriptors),
        opened(target, os.O_RDWR) as written,
        _locks_named(source),
    ):
        size = max(os.fstat(written).st_size, usable_size(written, target_format))
        files = [*(others or ()), BoundFile(source, descriptor), BoundFile(target, written, writable=True)]
        run_with_progress(
            ["qemu-img", "convert", "-p", "-n", *zero, *secrets, "--target-image-opts", *opening]
            + [image_options(target, target_format, len(deks))],
            confinement=_working(size, *files),
            pass_fds=descriptors,
            progress=progress,
            stalled_after=_stalled_after(size),
        )


@dataclass(frozen=True, slots=True)
class CopySource:
    """The source of a copy into an encrypted image, with its whole block graph stated.

    :ivar node: QEMU's description of the source.
    :ivar deks: keys of the source, as for :func:`block_node`; empty for a plaintext image.
    :ivar image: the source, if encrypted.
    """

    node: dict[str, object]
    files: tuple[BoundFile, ...] = ()
    deks: tuple[Dek, ...] = ()
    image: tuple[Path, DiskFormat] | None = None

    @classmethod
    def encrypted(cls, path: Path, image_format: DiskFormat, deks: Sequence[Dek]) -> Self:
        """The content of our image at *path*."""
        return cls(block_node(path, image_format, len(deks)), deks=tuple(deks), image=(path, image_format))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[list[str], list[int], list[BoundFile]]]:
        """Secrets, their descriptors, and files for the tool."""
        if self.image is None:
            yield [], [], list(self.files)
            return
        with keys_to(*self.image, self.deks) as keys:
            yield keys.secrets, keys.descriptors, [keys.image]

    @property
    def filename(self) -> str:
        """The node as a file name for QEMU's tools."""
        return "json:" + json.dumps(self.node)


def copy_into(
    source: CopySource,
    target: Path,
    target_format: DiskFormat,
    deks: Sequence[Dek],
    progress: Callable[[float], None],
    *,
    max_rate: int | None = None,
    is_new: bool = False,
) -> None:
    """Overwrite the content of the encrypted image *target* with the content of *source*.

    The plaintext exists in the memory of qemu-img only.

    :param target: at least as large as the source.
    :param progress: called with the completed fraction, from 0.0 to 1.0.
    :param max_rate: upper bound in bytes/s.
    :param is_new: whether nothing was written to *target* before.
    :raise DiskInUseError: When a QEMU process has an image open.
    :raise ImageError: When there is no room.
    :raise ToolError: When the source cannot be read, or reading stalls.
    """
    first = len(source.deks)
    with (
        source._opened() as (secrets, descriptors, files),
        keys_to(target, target_format, deks, writable=True, first=first) as keys,
        _locks_named(source.image[0] if source.image else target),
    ):
        size = max(target.stat().st_size, usable_size(keys.image.descriptor, target_format))
        rate = ["-r", str(max_rate)] if max_rate else []
        zero = ["--target-is-zero"] if is_new and target_format is DiskFormat.QCOW2 else []
        run_with_progress(
            ["qemu-img", "convert", "-p", "-n", *zero, *rate, *secrets, *keys.secrets, "--target-image-opts"]
            + [source.filename, image_options(target, target_format, len(deks), first_secret=first)],
            confinement=_working(size, *files, keys.image),
            pass_fds=[*descriptors, *keys.descriptors],
            progress=progress,
            stalled_after=_stalled_after(size) if not max_rate else size / 100 / max_rate + _STALLED_SECONDS,
        )


def compare(
    source: CopySource,
    target: Path,
    target_format: DiskFormat,
    deks: Sequence[Dek],
    progress: Callable[[float], None],
) -> None:
    """Compare the content of an encrypted image with *source*; bytes beyond the shorter must be zero.

    :raise ImageError: When the contents differ.
    :raise ToolError: When an image cannot be read, or reading stalls.
    """
    first = len(source.deks)
    with (
        source._opened() as (secrets, descriptors, files),
        keys_to(target, target_format, deks, first=first) as keys,
    ):
        size = target.stat().st_size
        run_with_progress(
            ["qemu-img", "compare", "-p", *secrets, *keys.secrets, source.filename]
            + ["json:" + json.dumps(block_node(target, target_format, len(deks), first=first))],
            confinement=_working(size, *files, keys.image),
            pass_fds=[*descriptors, *keys.descriptors],
            progress=progress,
            stalled_after=_stalled_after(size),
        )


def _working(size: int, *files: BoundFile) -> Confinement:
    """Limits of a tool that reads or writes images of *size* bytes throughout: its tables grow with them."""
    return Confinement(
        files=files, memory=(2 << 30) + size // 1024, cpu_seconds=None, written=size + size // 8 + (64 << 20)
    )


def _stalled_after(size: int) -> float:
    return _STALLED_SECONDS + size / 100 / _SLOWEST


def node_without_backing(path: Path, descriptor: int, image_format: str) -> dict[str, object]:
    """A block node for the foreign image *path*, open at *descriptor*, without the header's backing file."""
    driver = "host_device" if stat.S_ISBLK(os.fstat(descriptor).st_mode) else "file"
    file = {"driver": driver, "filename": str(path)}
    node: dict[str, object] = {"driver": image_format, "file": file}
    if image_format in _WITH_BACKING:
        node["backing"] = None
    return node


def decrypt_to(
    source: Path,
    source_format: DiskFormat,
    target: int,
    target_format: str,
    deks: Sequence[Dek],
    progress: Callable[[float], None],
) -> None:
    """Write the plaintext of the encrypted image *source* to the descriptor *target*, in *target_format*.

    :raise DiskInUseError: When a QEMU process is writing to *source*.
    :raise ImageError: When there is no room.
    :raise ToolError: When *source* cannot be read, or reading stalls.
    """
    size = usable_size_within(source, source_format, deks)
    with keys_to(source, source_format, deks) as keys, _locks_named(source):
        run_with_progress(
            ["qemu-img", "convert", "-p", *keys.secrets, "-O", target_format]
            + [json_filename(source, source_format, len(deks)), f"/proc/self/fd/{target}"],
            confinement=_working(size, keys.image),
            pass_fds=[*keys.descriptors, target],
            progress=progress,
            stalled_after=_stalled_after(size),
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


def resize(path: Path, image_format: DiskFormat, size: int, deks: Sequence[Dek], *, shrink: bool) -> None:
    """Change the usable size of an unused image to *size* bytes.

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
    with keys_to(path, image_format, deks, writable=True) as keys, _locks_named(path):
        run(
            ["qemu-img", "resize", "-q", *keys.secrets, *(["--shrink"] if shrink else [])]
            + [json_filename(path, image_format, len(deks)), str(size)],
            confinement=_working(max(room, qcow2.most_room(size)), keys.image),
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
            with keys_to(path, image_format, opening) as keys, _locks_named(path):
                run(
                    ["qemu-img", "check", "-q", *keys.secrets]
                    + [json_filename(path, image_format, len(opening))],
                    confinement=_working(path.stat().st_size, keys.image),
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


def refuse_if_open(path: Path) -> None:
    """Check that no QEMU process has the image open, not even for reading.

    QEMU locks bytes of an image (``RAW_LOCK_PERM_BASE`` in its ``block/file-posix.c``). QEMU's own tools are
    more permissive: they accept readers, and writers of raw LUKS images, whose driver shares them.

    :raise DiskInUseError: When a QEMU process has the image open.
    :raise ImageError: When the image is missing or cannot be read.
    """
    with opened(path) as descriptor:
        refuse_if_locked(path, descriptor)


def refuse_if_locked(path: Path, descriptor: int) -> None:
    """As :func:`refuse_if_open`, for an open file or block device."""
    if is_locked(descriptor, _QEMU_LOCKS, _QEMU_LOCKS_LENGTH):
        raise DiskInUseError(f"{path} is in use by a running domain or another QEMU process")


@contextlib.contextmanager
def opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open the image file *path*; an ``OSError`` of the block becomes an :class:`ImageError`.

    An :class:`ImageFormatError` of the block gets the path.

    :raise ImageError: When the file is missing, not regular, or cannot be opened.
    """
    try:
        descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a FIFO must not block
    except FileNotFoundError as exc:
        raise ImageError(f"image {path} is missing") from exc
    except OSError as exc:
        raise ImageError(f"cannot open {path}: {exc.strerror}") from exc
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ImageError(f"{path} is not a regular file")
        yield descriptor
    except ImageFormatError as exc:
        if str(path) in str(exc):
            raise
        raise ImageFormatError(f"{path}: {exc}", hint=exc.hint) from exc
    except OSError as exc:
        raise ImageError(f"cannot read or write {path}: {exc.strerror}") from exc
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(path: Path) -> Iterator[int]:
    """Hold a foreign image from check to use: another file that takes its name is not read.

    Refuses files on which qemu-img would block or never end, e.g. FIFOs and character devices.

    :return: an ``O_PATH`` descriptor, which opens no device.
    :raise ImageError: When *path* is missing, or neither a file nor a block device.
    """
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as exc:
        raise ImageError(f"cannot read {path}: {exc.strerror}") from exc
    try:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ImageError(f"{path} is neither a file nor a block device")
        yield descriptor
    finally:
        os.close(descriptor)


def probe_format(descriptor: int) -> DiskFormat:
    """Detect the format of the encrypted image open at *descriptor*.

    :raise ImageFormatError: When the image is neither qcow2 nor raw LUKS.
    """
    start = os.pread(descriptor, luks.HEADER_END, 0)
    if start.startswith(qcow2.MAGIC):
        return DiskFormat.QCOW2
    luks.Luks1Header.parse(start)
    return DiskFormat.RAW


def luks_area(descriptor: int, image_format: DiskFormat) -> tuple[int, int]:
    """Offset and length, in bytes, of the LUKS header and its keyslots within the file; validates the header.

    :raise ImageFormatError: When the header is missing, damaged or refused (:mod:`.image_header`).
    """
    return image_header.validate(descriptor, image_format)


def usable_size(descriptor: int, image_format: DiskFormat) -> int:
    """The usable size of the outermost volume, in bytes, computed from header and file size.

    :raise ImageFormatError: When the image is damaged or not in *image_format*.
    """
    _, header_length = luks_area(descriptor, image_format)
    if image_format is DiskFormat.QCOW2:
        return qcow2.Qcow2Header.read(descriptor).size
    size = os.fstat(descriptor).st_size - header_length
    if size <= 0:
        raise ImageFormatError("a LUKS image without data after its header")
    return size


def erase(path: Path, image_format: DiskFormat) -> None:
    """Crypto-erase an image: overwrite the LUKS header and all keyslots durably.

    At most 4 MiB within the file are overwritten, whatever length the image's header names. If the header is
    damaged, these are the first 4 MiB of the file.

    :raise ImageError: When the file cannot be written.
    """
    with opened(path, os.O_RDWR) as descriptor:
        try:
            offset, length = image_header.locate(descriptor, image_format)
        except ImageFormatError:
            offset, length = 0, _ERASED_AT_MOST
        end = min(offset + min(length, _ERASED_AT_MOST), os.fstat(descriptor).st_size)
        for begin in range(offset, end, _ERASED_AT_ONCE):
            write_at(descriptor, os.urandom(min(_ERASED_AT_ONCE, end - begin)), begin)
        os.fsync(descriptor)

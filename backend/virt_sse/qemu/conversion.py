"""Content written from one image into another, and compared, with qemu-img."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu.image_file import file_driver, opened, usable_size
from virt_sse.qemu.img import locks_named, usable_size_within, working_limits
from virt_sse.qemu.unlocking import (
    BaseImage,
    block_node,
    image_options,
    json_filename,
    keys_to,
    secrets_to,
)
from virt_sse.system.confinement import BoundFile
from virt_sse.system.files import length
from virt_sse.system.tools import run_with_progress

_CONVERT = ("qemu-img", "convert", "-p", "-W")
"""``-W``: writes need not be in order. In order, encryption and writing do not overlap: half the rate."""
_STALLED_SECONDS, _SLOWEST = 600.0, 10 << 20
"""A conversion reports each percent: time for one, in addition to the time at this rate in bytes/s."""

_WITH_BACKING = ("qcow", "qcow2", "qed", "vmdk")
"""QEMU's drivers with the option ``backing``."""


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
        secrets_to(target, deks) as (secrets, descriptors),
        opened(target, os.O_RDWR) as written,
        locks_named(source),
    ):
        size = max(os.fstat(written).st_size, usable_size(written, target_format))
        files = [*(others or ()), BoundFile(source, descriptor), BoundFile(target, written, writable=True)]
        run_with_progress(
            [*_CONVERT, "-n", *zero, *secrets, "--target-image-opts", *opening]
            + [image_options(target, target_format, len(deks))],
            confinement=working_limits(size, *files),
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
    :ivar base: the image below.
    """

    node: dict[str, object]
    files: tuple[BoundFile, ...] = ()
    deks: tuple[Dek, ...] = ()
    image: tuple[Path, DiskFormat] | None = None
    base: BaseImage | None = None

    @classmethod
    def encrypted(
        cls, path: Path, image_format: DiskFormat, deks: Sequence[Dek], *, base: BaseImage | None = None
    ) -> Self:
        """The content of our image at *path*, over that of *base*."""
        node = block_node(path, image_format, len(deks), base=base)
        return cls(node, deks=tuple(deks), image=(path, image_format), base=base)

    @property
    def secrets(self) -> int:
        """Number of the secrets in :attr:`node`."""
        return len(self.deks) + (len(self.base.all_deks) if self.base else 0)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[list[str], list[int], list[BoundFile]]]:
        """Secrets, their descriptors, and files for the tool."""
        if self.image is None:
            yield [], [], list(self.files)
            return
        with keys_to(*self.image, self.deks, base=self.base) as keys:
            yield keys.secrets, keys.descriptors, list(keys.files)

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
    first = source.secrets
    with (
        source.opened() as (secrets, descriptors, files),
        keys_to(target, target_format, deks, writable=True, first=first) as keys,
        locks_named(source.image[0] if source.image else target),
    ):
        size = max(length(keys.image.descriptor), usable_size(keys.image.descriptor, target_format))
        rate = ["-r", str(max_rate)] if max_rate else []
        zero = ["--target-is-zero"] if is_new and target_format is DiskFormat.QCOW2 else []
        run_with_progress(
            [*_CONVERT, "-n", *zero, *rate, *secrets, *keys.secrets, "--target-image-opts"]
            + [source.filename, image_options(target, target_format, len(deks), first_secret=first)],
            confinement=working_limits(size, *files, keys.image),
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
    first = source.secrets
    with (
        source.opened() as (secrets, descriptors, files),
        keys_to(target, target_format, deks, first=first) as keys,
    ):
        size = length(keys.image.descriptor)
        run_with_progress(
            ["qemu-img", "compare", "-p", *secrets, *keys.secrets, source.filename]
            + ["json:" + json.dumps(block_node(target, target_format, len(deks), first=first))],
            confinement=working_limits(size, *files, keys.image),
            pass_fds=[*descriptors, *keys.descriptors],
            progress=progress,
            stalled_after=_stalled_after(size),
        )


def _stalled_after(size: int) -> float:
    return _STALLED_SECONDS + size / 100 / _SLOWEST


def node_without_backing(path: Path, descriptor: int, image_format: str) -> dict[str, object]:
    """A block node for the foreign image *path*, open at *descriptor*, without the header's backing file."""
    file = {"driver": file_driver(descriptor), "filename": str(path)}
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
    *,
    base: BaseImage | None = None,
) -> None:
    """Write the plaintext of the encrypted image *source* to the descriptor *target*, in *target_format*.

    :param base: the image below.
    :raise DiskInUseError: When a QEMU process is writing to *source*.
    :raise ImageError: When there is no room.
    :raise ToolError: When *source* cannot be read, or reading stalls.
    """
    size = usable_size_within(source, source_format, deks)
    with keys_to(source, source_format, deks, base=base) as keys, locks_named(source):
        run_with_progress(
            [*_CONVERT, *keys.secrets, "-O", target_format]
            + [json_filename(source, source_format, len(deks), base=base), f"/proc/self/fd/{target}"],
            confinement=working_limits(size, *keys.files),
            pass_fds=[*keys.descriptors, target],
            progress=progress,
            stalled_after=_stalled_after(size),
        )

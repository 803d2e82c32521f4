"""Images opened with their keys: validated headers, secrets, and QEMU's description of the block graph.

Multiple LUKS volumes of an image are nested, each in the image's format. Volumes and their DEKs are always
listed from the guest's, innermost, to the outermost, whose header is in the file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

from virt_sse.errors import ImageFormatError, ToolError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import ceph
from virt_sse.qemu.image_file import file_node, opened
from virt_sse.qemu.serving import served
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.system.confinement import BoundFile
from virt_sse.system.rbd_names import is_rbd
from virt_sse.system.tools import passphrase_descriptor


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


@contextlib.contextmanager
def secrets_to(path: Path, deks: Sequence[Dek], *, first: int = 0) -> Iterator[tuple[list[str], list[int]]]:
    """As :func:`secrets_for`, for the image at *path*: with the key of the Ceph user for an RBD image."""
    with contextlib.ExitStack() as stack:
        secrets, descriptors = stack.enter_context(secrets_for(deks, first=first))
        if is_rbd(path):
            more, further = stack.enter_context(ceph.secret(first))
            secrets, descriptors = secrets + more, descriptors + further
        yield secrets, descriptors


@dataclass(frozen=True, slots=True)
class BaseImage:
    """The image below another image, with keys of its own; only read.

    No header names the image below: whoever opens an image states the whole block graph.

    :ivar deks: of all its volumes.
    :ivar base: the image below this one, if any.
    """

    disk_id: UUID
    path: Path
    format: DiskFormat
    deks: tuple[Dek, ...]
    base: Self | None = None

    @property
    def all_deks(self) -> tuple[Dek, ...]:
        """The DEKs of this image and of all images below, in the order of their secrets."""
        return self.deks + (self.base.all_deks if self.base else ())


@dataclass(frozen=True, slots=True)
class Unlocking:
    """What a QEMU tool needs to open a validated image with its keys.

    :ivar secrets: arguments that define the secret objects.
    :ivar descriptors: descriptors of the secrets, to be inherited by the tool.
    :ivar image: the validated image.
    :ivar files: the image, and the validated images below.
    """

    secrets: list[str]
    descriptors: list[int]
    image: BoundFile
    files: tuple[BoundFile, ...]


@contextlib.contextmanager
def keys_to(
    path: Path,
    image_format: DiskFormat,
    deks: Sequence[Dek],
    *,
    writable: bool = False,
    first: int = 0,
    base: BaseImage | None = None,
) -> Iterator[Unlocking]:
    """As :func:`secrets_for`, after validating the headers of all volumes of the image at *path*.

    :param deks: of all volumes to be opened.
    :param writable: let the tool write to the image.
    :param first: number of the first secret.
    :param base: the image below; its secrets follow.
    :raise ImageFormatError: When a header is missing, damaged or refused (:mod:`.image_header`).
    :raise ToolError: When the DEKs of outer volumes do not unlock these.
    """
    with contextlib.ExitStack() as stack:
        image = BoundFile(path, _held_valid(stack, path, image_format, deks[1:]), writable)
        files, all_deks = [image], [*deks]
        while base:
            files.append(BoundFile(base.path, _held_valid(stack, base.path, base.format, base.deks[1:])))
            all_deks += base.deks
            base = base.base
        secrets, descriptors = stack.enter_context(secrets_to(path, all_deks, first=first))
        yield Unlocking(secrets, descriptors, image, tuple(files))


def _held_valid(
    stack: contextlib.ExitStack, path: Path, image_format: DiskFormat, outer: Sequence[Dek]
) -> int:
    """Validate the headers of all volumes of the image at *path*: a descriptor, closed by *stack*."""
    with opened(path) as descriptor:
        _validate_volumes(path, descriptor, image_format, outer)
        held_open = os.dup(descriptor)
    stack.callback(os.close, held_open)
    return held_open


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
            secrets_to(path, around) as (secrets, descriptors),
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


def block_node(
    path: Path, image_format: DiskFormat, volumes: int, *, first: int = 0, base: BaseImage | None = None
) -> dict[str, object]:
    """QEMU's description of the image at *path*, opened with the secrets of :func:`secrets_for`.

    The description has the whole block graph: QEMU must not take a backing file from a header.

    :param volumes: number of LUKS volumes to open, outermost first; below the image's number, the content of
        the opened node is ciphertext.
    :param first: number of the first secret.
    :param base: the image below the innermost volume, with secrets after those of the image.
    """
    below = None
    if base:
        below = block_node(base.path, base.format, len(base.deks), first=first + volumes, base=base.base)
        below |= {"read-only": True}
    node = file_node(path, first)
    for number in reversed(range(first, first + volumes)):
        node = {"driver": image_format.qemu_driver, "file": node}
        if image_format is DiskFormat.QCOW2:
            node["backing"] = below if number == first else None
            node["encrypt"] = {"format": "luks", "key-secret": f"dek{number}"}
        else:
            node["key-secret"] = f"dek{number}"
    return node


def json_filename(
    path: Path, image_format: DiskFormat, volumes: int, *, base: BaseImage | None = None
) -> str:
    """Encode :func:`block_node` as a file name for QEMU's tools (``json:``, qemu-block-drivers(7))."""
    return "json:" + json.dumps(block_node(path, image_format, volumes, base=base))


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
    options += _flat("file." * volumes, file_node(path, first_secret))
    return ",".join(options)


def _flat(prefix: str, value: object) -> list[str]:
    """A block node, or a part, as options of QEMU's command line."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        dot = prefix if prefix.endswith(".") or not prefix else f"{prefix}."
        return [option for name, each in items for option in _flat(f"{dot}{name}", each)]
    return [f"{prefix}={str(value).replace(',', ',,')}"]

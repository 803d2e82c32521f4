"""Reading and writing of an envelope in the two slots of an image's LUKS header.

A write replaces the slot with the older envelope first, makes the write durable, and then replaces the other.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from pathlib import Path

from virt_sse.errors import EnvelopeError, ImageError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.envelope import SLOT_BYTES, SLOT_OFFSETS, Envelope
from virt_sse.qemu import image_header
from virt_sse.qemu.img import luks_area, opened
from virt_sse.system.files import write_at


def read(descriptor: int, image_format: DiskFormat) -> Envelope:
    """The envelope in the LUKS header of the open image.

    :raise ImageFormatError: When the header is missing, damaged or refused.
    :raise EnvelopeError: When neither slot is valid. A damaged envelope is reported before an empty slot.
    """
    return _newest(descriptor, luks_area(descriptor, image_format)[0])


def _newest(descriptor: int, luks_offset: int) -> Envelope:
    found: list[Envelope] = []
    errors: list[EnvelopeError] = []
    for slot in _slots(descriptor, luks_offset):
        try:
            found.append(Envelope.decode(slot))
        except EnvelopeError as exc:
            errors.append(exc)
    if found:
        return max(found, key=lambda envelope: envelope.generation)
    raise max(errors, key=lambda error: not str(error).startswith("no envelope"))


def read_slots(descriptor: int, image_format: DiskFormat) -> dict[str, Envelope]:
    """The envelopes in the valid slots, by slot name: ``A``, ``B``.

    :raise ImageFormatError: When the header is missing, damaged or refused.
    :raise EnvelopeError: When neither slot is valid.
    """
    found = {}
    for name, slot in zip("AB", _slots(descriptor, luks_area(descriptor, image_format)[0]), strict=True):
        with contextlib.suppress(EnvelopeError):
            found[name] = Envelope.decode(slot)
    if not found:
        raise EnvelopeError("neither copy of the envelope can be read")
    return found


def carried_id(path: Path, image_format: DiskFormat) -> uuid.UUID | None:
    """The disk id in the envelope of the image at *path*; ``None`` without a readable envelope.

    Also of an image with a refused header, to be erased.
    """
    try:
        with opened(path) as descriptor:
            return id_in(descriptor, image_format)
    except ImageError:
        return None


def id_in(descriptor: int, image_format: DiskFormat) -> uuid.UUID | None:
    """As :func:`carried_id`, for an open image."""
    try:
        return _newest(descriptor, image_header.locate(descriptor, image_format)[0]).disk_id
    except ImageError:
        return None


def write(descriptor: int, image_format: DiskFormat, envelope: Envelope) -> None:
    """Write *envelope* to both slots of the LUKS header; the first write is durable before the second begins.

    Also works on an image in use by a running QEMU, which neither reads nor writes the slots.

    :raise ImageFormatError: When the header is missing, damaged or refused.
    :raise EnvelopeError: When the envelope is too large for a slot.
    :raise OSError: When the image cannot be written.
    """
    content = envelope.encode()
    luks_offset, _ = luks_area(descriptor, image_format)
    current, other = SLOT_OFFSETS
    generations = [_generation(slot) for slot in _slots(descriptor, luks_offset)]
    if generations[1] > generations[0]:
        current, other = other, current
    for offset in (other, current):
        write_at(descriptor, content, luks_offset + offset)
        os.fdatasync(descriptor)  # the content, and where it lies; times of the file may be lost


def _slots(descriptor: int, luks_offset: int) -> list[bytes]:
    return [os.pread(descriptor, SLOT_BYTES, luks_offset + offset) for offset in SLOT_OFFSETS]


def _generation(slot: bytes) -> int:
    try:
        return Envelope.decode(slot).generation
    except EnvelopeError:
        return -1

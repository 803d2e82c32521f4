"""Reading and writing of an envelope in the two slots of an image's LUKS header, with the slots' seals.

A write replaces the slot with the older envelope first, makes the write durable, and then replaces the other.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import EnvelopeError, ImageError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.envelope import SLOT_BYTES, SLOT_OFFSETS, Envelope, sealed_part
from virt_sse.model.seal import SEAL_BYTES, SEAL_OFFSETS, Seal, SealKey
from virt_sse.qemu import image_header
from virt_sse.qemu.image_file import luks_area, opened, sync
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.system.files import write_at


@dataclass(frozen=True, slots=True)
class CarriedEnvelope:
    """The current envelope of an image.

    :ivar uses: the authenticated use counter; ``None`` without a valid seal.
    :ivar foreign: whether the only seals are under a different host key.
    :ivar header: digest of the LUKS header and its active keyslots.
    """

    format: DiskFormat
    envelope: Envelope
    uses: int | None
    foreign: bool
    header: bytes

    @property
    def authenticity(self) -> str:
        """The authenticity in words, for the audit log."""
        if self.uses is not None:
            return f"authentic, use {self.uses}"
        return "sealed by another host" if self.foreign else "not sealed by this host"


def read(descriptor: int, image_format: DiskFormat) -> Envelope:
    """The envelope in the LUKS header of the open image. Not authenticated: see :func:`read_sealed`.

    :raise ImageFormatError: When the header is missing, damaged or refused.
    :raise EnvelopeError: When neither slot is valid. A damaged envelope is reported before an empty slot.
    """
    return _newest(descriptor, luks_area(descriptor, image_format)[0]).envelope


def read_sealed(descriptor: int, image_format: DiskFormat, key: SealKey) -> CarriedEnvelope:
    """The envelope with its use counter; an authenticated envelope before any other.

    :raise: As :func:`read`.
    """
    luks_offset, header = _header(descriptor, image_format)
    newest = _newest(descriptor, luks_offset, key, header)
    is_foreign = newest.seal is not None and newest.seal.key_id != key.id
    return CarriedEnvelope(image_format, newest.envelope, newest.uses, is_foreign, header)


@dataclass(frozen=True, slots=True)
class _Slot:
    """A valid slot.

    :ivar uses: the authenticated use counter.
    """

    number: int
    envelope: Envelope
    seal: Seal | None
    uses: int | None

    @property
    def rank(self) -> tuple[int, int, int, int]:
        claimed = self.seal.uses if self.seal else 0
        return self.uses or 0, self.envelope.generation, claimed, -self.number


def _newest(descriptor: int, luks_offset: int, key: SealKey | None = None, header: bytes = b"") -> _Slot:
    """The slot with the newest envelope; a slot authenticated by *key* before any other.

    :raise EnvelopeError: When neither slot is valid.
    """
    found: list[_Slot] = []
    errors: list[EnvelopeError] = []
    seals = _seals(descriptor, luks_offset)
    for number, (slot, seal) in enumerate(zip(_slots(descriptor, luks_offset), seals, strict=True)):
        try:
            envelope = Envelope.decode(slot)
        except EnvelopeError as exc:
            errors.append(exc)
        else:
            is_ours = key is not None and seal is not None and key.verifies(seal, sealed_part(slot), header)
            found.append(_Slot(number, envelope, seal, seal.uses if seal and is_ours else None))
    if found:
        return max(found, key=lambda slot: slot.rank)
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
        return _newest(descriptor, image_header.locate(descriptor, image_format)[0]).envelope.disk_id
    except ImageError:
        return None


def write(
    descriptor: int,
    image_format: DiskFormat,
    envelope: Envelope,
    sealing: tuple[SealKey, int] | None = None,
) -> None:
    """Write *envelope* to both slots of the LUKS header; the first write is durable before the second begins.

    Also works on an image in use by a running QEMU, which neither reads nor writes the slots.

    :param sealing: key and use counter of the seals; default: no seals, e.g. for a temporary disk.
    :raise ImageFormatError: When the header is missing, damaged or refused.
    :raise EnvelopeError: When the envelope is too large for a slot.
    :raise OSError: When the image cannot be written.
    """
    luks_offset, header = _header(descriptor, image_format)
    for number in _order(descriptor, luks_offset, header, sealing):
        _write_slot(descriptor, luks_offset, header, number, envelope, sealing)


def advance(
    descriptor: int, image_format: DiskFormat, envelope: Envelope, sealing: tuple[SealKey, int]
) -> None:
    """Write *envelope*, the image's own, with a new use counter to the slot with the older envelope.

    A single durable write: if torn, the other slot is valid and has the counter before.

    :raise: As :func:`write`.
    """
    luks_offset, header = _header(descriptor, image_format)
    older, _ = _order(descriptor, luks_offset, header, sealing)
    _write_slot(descriptor, luks_offset, header, older, envelope, sealing)


def _order(
    descriptor: int, luks_offset: int, header: bytes, sealing: tuple[SealKey, int] | None
) -> tuple[int, int]:
    """The numbers of the slots: the slot with the older envelope, or none, first."""
    key = sealing[0] if sealing else None
    try:
        current = _newest(descriptor, luks_offset, key, header).number
    except EnvelopeError:
        current = 0
    return 1 - current, current


def _write_slot(
    descriptor: int,
    luks_offset: int,
    header: bytes,
    number: int,
    envelope: Envelope,
    sealing: tuple[SealKey, int] | None,
) -> None:
    content, seal = envelope.encode(), bytes(SEAL_BYTES)
    if sealing:
        key, uses = sealing
        seal = key.seal(sealed_part(content), header, uses).encode()
    write_at(descriptor, seal, luks_offset + SEAL_OFFSETS[number])
    write_at(descriptor, content, luks_offset + SLOT_OFFSETS[number])
    sync(descriptor)


def _header(descriptor: int, image_format: DiskFormat) -> tuple[int, bytes]:
    """Offset and digest of the LUKS header. The digest takes long: an active key slot has 256 KiB."""
    luks_offset, _ = luks_area(descriptor, image_format)
    header = VolumeHeader.read(
        lambda offset, length: os.pread(descriptor, length, offset), luks_offset, image_format
    )
    return luks_offset, header.digest


def _slots(descriptor: int, luks_offset: int) -> list[bytes]:
    return [os.pread(descriptor, SLOT_BYTES, luks_offset + offset) for offset in SLOT_OFFSETS]


def _seals(descriptor: int, luks_offset: int) -> list[Seal | None]:
    return [Seal.decode(os.pread(descriptor, SEAL_BYTES, luks_offset + offset)) for offset in SEAL_OFFSETS]

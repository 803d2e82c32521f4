"""Evidence from images: their LUKS headers and envelopes."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from virt_sse.errors import CephError, EnvelopeError, ImageError, StaleImageError, VirtSseError
from virt_sse.keys.access import KeyAccess
from virt_sse.keys.freshness import ImageFreshness
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.envelope import Envelope
from virt_sse.model.events import audit_context
from virt_sse.qemu import envelope_slots, image_file, unlocking
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.verification.verdict import DataPlace, DiskVerdict, Layer

IMAGE, BASE, WITHIN = "image", "image below", "within that"


def check_image(verdict: DiskVerdict, disk: Disk, freshness: ImageFreshness, *, where: str = IMAGE) -> None:
    """Check the cipher of the image's outermost volume, the DEKs in its envelope, and its freshness.

    :param where: names the layer.
    """
    entry = disk.deks[-1]
    carried = _check(verdict, disk.path, disk.format, disk.id)
    cipher, key = _cipher(verdict, disk.path, disk.format), str(entry.wrapped.key)
    verdict.layers.append(Layer(where, cipher, entry.slot, key, str(disk.path)))
    if cipher:
        verdict.expect(
            cipher == str(entry.cipher), f"the image is encrypted with {cipher}, not {entry.cipher}"
        )
    if carried and carried.disk_id == disk.id:
        is_same = carried.deks == disk.deks
        verdict.expect(is_same, "the wrapped DEKs in the image differ from the store")
        try:
            freshness.check(disk)
        except StaleImageError as exc:
            verdict.expect(False, str(exc))
        except VirtSseError as exc:
            verdict.expect(False, f"cannot check the age of the image: {exc}")


def check_within(
    verdict: DiskVerdict, disk: Disk, keys: KeyAccess, freshness: ImageFreshness, domain: str
) -> None:
    """Check the header of the inner volume of an image with nested volumes: its cipher, and its freshness.

    A separate process opens the outer volumes, read-only, also while a domain uses the image. The process
    needs the DEKs of all volumes but the guest's. These key uses are in the audit log.
    """
    entry, *others = disk.deks
    if not others:
        return
    try:
        with audit_context(domain=domain):
            deks = [keys.unwrap_slot(disk, other.slot) for other in others]
        headers = unlocking.validate(disk.path, disk.format, deks)
    except VirtSseError as exc:
        verdict.expect(False, f"cannot inspect the image's inner layer: {exc}")
        return
    cipher = str(headers[0].cipher)
    verdict.layers.append(Layer(WITHIN, cipher, entry.slot, str(entry.wrapped.key)))
    verdict.expect(
        cipher == str(entry.cipher), f"the image's inner layer is encrypted with {cipher}, not {entry.cipher}"
    )
    try:
        freshness.compare_inner(disk, headers)
    except VirtSseError as exc:
        verdict.expect(False, str(exc))


def check_temporary(verdict: DiskVerdict, path: Path, disk_id: UUID, cipher: str) -> Layer:
    """Check the image of a VM's temporary disk; return its layer."""
    carried = _check(verdict, path, DiskFormat.RAW, disk_id)
    entry = carried.deks[0] if carried and carried.deks else None
    key = str(entry.wrapped.key) if entry else None
    found = _cipher(verdict, path, DiskFormat.RAW)
    if found:
        verdict.expect(found == cipher, f"the image is encrypted with {found}, not {cipher}")
    return Layer(IMAGE, found, entry.slot if entry else None, key, str(path))


def _check(verdict: DiskVerdict, path: Path, image_format: DiskFormat, disk_id: UUID) -> Envelope | None:
    """Read the envelope of an image, and check the disk id in the envelope."""
    try:
        with image_file.opened(path) as descriptor:
            carried = envelope_slots.read(descriptor, image_format)
    except EnvelopeError as exc:
        verdict.expect(False, f"the image carries no wrapped DEKs: {exc}")
        return None
    except (ImageError, CephError):  # reported by _cipher
        return None
    verdict.expect(carried.disk_id == disk_id, f"{path} is the image of another disk: it was replaced")
    return carried


def _cipher(verdict: DiskVerdict, path: Path, image_format: DiskFormat) -> str | None:
    try:
        with image_file.opened(path) as descriptor:
            cipher = str(VolumeHeader.of_file(descriptor, image_format).cipher)
    except (ImageError, CephError) as exc:
        verdict.expect(False, f"{path}: {exc}" if str(path) not in str(exc) else str(exc))
        return None
    verdict.places.append(DataPlace(str(path), False))
    return cipher

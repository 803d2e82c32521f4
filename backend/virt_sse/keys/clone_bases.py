"""The images below linked clones: checked and unlocked wherever a clone's content is read.

A clone's header names no backing file. The store and the clone's sealed envelope name the image by id, and
the path is the store's.
"""

from __future__ import annotations

from virt_sse.errors import DiskNotFoundError, DiskStateError, ImageError, StaleImageError
from virt_sse.keys.host import Host
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.keys import Dek
from virt_sse.qemu import image_file, img, unlocking
from virt_sse.qemu.unlocking import BaseImage


def image_below(host: Host, clone: Disk) -> Disk:
    """The image below a linked clone, as stored.

    :raise DiskNotFoundError: When the store does not have the image.
    :raise DiskStateError: When the image is not ready, is of another set than the clone, or is no image.
    """
    assert clone.base_id is not None  # noqa: S101 -- of the caller
    found = host.store_reads.with_ids([clone.base_id])
    if not found:
        raise DiskNotFoundError(
            f"disk {clone.name!r} is a linked clone of image {clone.base_id}, which the store does not have",
            hint="if the image's file is intact, 'virt-sse disk adopt PATH' adds the image to the store",
        )
    (image,) = found
    if image.kind is not DiskKind.IMAGE or image.base_id is not None:
        raise DiskStateError(f"disk {clone.name!r} cannot be a linked clone of {image.name!r}")
    if image.state is not DiskState.READY:
        raise DiskStateError(f"image {image.name!r}, below disk {clone.name!r}, is {image.state.value}")
    if image.set_id != clone.set_id:
        raise DiskStateError(
            f"disk {clone.name!r} and image {image.name!r} below are in different encryption sets"
        )
    return image


def unlocked_base(host: Host, disk: Disk) -> BaseImage | None:
    """The image below *disk* with its DEKs; ``None`` unless *disk* is a linked clone.

    Each use of a DEK is in the audit log. An image is never written, therefore any image but the last known
    is refused, whatever the policy for disks says.

    :raise StaleImageError: When the image is not the last known, or has another size than the store says.
    :raise ImageError: When the image is missing, damaged or that of another disk.
    :raise KeyProviderError: When a DEK cannot be unwrapped.
    :raise VirtSseError: As :func:`image_below`.
    """
    if not disk.is_linked_clone:
        return None
    image = image_below(host, disk)
    try:
        host.freshness.check(image)
        deks = tuple(host.keys.unwrap_all(image))
        headers = unlocking.validate(image.path, image.format, deks[1:])
        host.freshness.check_inner(image, headers, always_refuse=True)
        size = _size(image, deks)
    except StaleImageError as exc:
        raise StaleImageError(f"the image below disk {disk.name!r}: {exc}", hint=exc.hint) from exc
    except ImageError as exc:
        raise ImageError(f"the image below disk {disk.name!r}: {exc}", hint=exc.hint) from exc
    if size != image.size:
        raise StaleImageError(
            f"image {image.name!r}, below disk {disk.name!r}, has {size} bytes instead of {image.size}",
            hint="restore the image's file from a backup",
        )
    return BaseImage(image.id, image.path, image.format, deks)


def _size(image: Disk, deks: tuple[Dek, ...]) -> int:
    """The usable size of an image in bytes."""
    if len(deks) > 1:
        return img.usable_size_within(image.path, image.format, deks)
    with image_file.opened(image.path) as descriptor:
        return image_file.usable_size(descriptor, image.format)

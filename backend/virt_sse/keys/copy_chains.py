"""What incremental copies and linked clones are based on: checked and unlocked where their content is read.

The image has what changed since the copy below. No header names the copy below: the store and the sealed
envelope name it by id, and the path is the store's.
"""

from __future__ import annotations

from collections.abc import Sequence

from virt_sse.errors import DiskNotFoundError, DiskStateError, ImageError, StaleImageError
from virt_sse.keys.host import Host
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.keys import Dek
from virt_sse.qemu import image_file, img, unlocking
from virt_sse.qemu.unlocking import BaseImage

LONGEST = 32
"""Copies in a chain, at most: each takes memory of whatever opens the chain."""


def copies_below(host: Host, copy: Disk) -> list[Disk]:
    """The copies that *copy* is based on, as stored, the nearest first; empty for a full copy.

    A linked clone is based on an image alone.

    :raise DiskNotFoundError: When the store does not have one of them.
    :raise DiskStateError: When one is not ready, of another kind or, below a linked clone, of another set, or
        the chain is a loop or too long.
    """
    found: list[Disk] = []
    above = copy
    while above.base_id is not None:
        if above.base_id in {copy.id, *(each.id for each in found)}:
            raise DiskStateError(f"the chain of {copy.kind.title} {copy.name!r} is a loop, at {above.name!r}")
        if len(found) + 1 >= LONGEST:
            raise DiskStateError(
                f"the chain of {copy.kind.title} {copy.name!r} has more than {LONGEST} links"
            )
        stored = host.store_reads.with_ids([above.base_id])
        if not stored:
            raise DiskNotFoundError(
                f"{above.kind.title} {above.name!r} is based on {above.base_id}, which is not in the store",
                hint="if its image is intact, 'virt-sse disk adopt PATH' adds it to the store",
            )
        (base,) = stored
        _refuse_unsuitable(above, base)
        if base.state is not DiskState.READY:
            raise DiskStateError(
                f"{base.kind.title} {base.name!r}, below {above.name!r}, is {base.state.value}"
            )
        found.append(base)
        above = base
    return found


def _refuse_unsuitable(above: Disk, base: Disk) -> None:
    named = f"{above.kind.title} {above.name!r}"
    if above.is_linked_clone:
        suits = base.kind is DiskKind.IMAGE and base.base_id is None
    else:
        suits = base.kind is above.kind
    if not suits:
        raise DiskStateError(f"{named} cannot be based on {base.kind.title} {base.name!r}")
    if above.is_linked_clone and above.set_id != base.set_id:
        raise DiskStateError(f"{named} and {base.kind.title} {base.name!r} are in different encryption sets")


def unlocked_base(host: Host, copy: Disk) -> BaseImage | None:
    """The chain below *copy* with its DEKs; ``None`` for a full copy.

    Each use of a DEK is in the audit log. A copy is never written, therefore any image but the last known is
    refused, whatever the policy for disks says. All are checked before a tool opens any.

    :raise StaleImageError: When an image is not the last known, or has another size than the store says.
    :raise ImageError: When an image is missing, damaged or that of another disk.
    :raise KeyProviderError: When a DEK cannot be unwrapped.
    :raise VirtSseError: As :func:`copies_below`.
    """
    below: BaseImage | None = None
    for base in reversed(copies_below(host, copy)):
        try:
            below = _unlocked(host, base, below)
        except StaleImageError as exc:
            raise StaleImageError(f"{_below(base, copy)}: {exc}", hint=exc.hint) from exc
        except ImageError as exc:
            raise ImageError(f"{_below(base, copy)}: {exc}", hint=exc.hint) from exc
    return below


def _unlocked(host: Host, copy: Disk, below: BaseImage | None) -> BaseImage:
    host.freshness.check(copy)
    deks = tuple(host.keys.unwrap_all(copy))
    headers = unlocking.validate(copy.path, copy.format, deks[1:])
    host.freshness.check_inner(copy, headers, always_refuse=True)
    refuse_other_size(copy, deks)
    return BaseImage(copy.id, copy.path, copy.format, deks, below)


def refuse_other_size(copy: Disk, deks: Sequence[Dek]) -> None:
    """Refuse the image of a copy whose usable size is not the size in the store.

    :raise StaleImageError: When the size differs.
    :raise ImageError: When the image is damaged, or *deks* do not unlock its volumes.
    """
    if (size := _size(copy, deks)) != copy.size:
        raise StaleImageError(
            f"{copy.path} has {size} bytes instead of {copy.size}", hint="restore the image from a backup"
        )


def _size(copy: Disk, deks: Sequence[Dek]) -> int:
    """The usable size of an image in bytes."""
    if len(deks) > 1:
        return img.usable_size_within(copy.path, copy.format, deks)
    with image_file.opened(copy.path) as descriptor:
        return image_file.usable_size(descriptor, copy.format)


def _below(base: Disk, copy: Disk) -> str:
    return f"{base.kind.title} {base.name!r}, below {copy.name!r}"

"""Copies of disks: new encrypted images, under new DEKs, with the content of disks, running or stopped.

Snapshots, images, restore points, and disks made from these are all copies.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from uuid import UUID

from virt_sse.disks.creation import LiveWrites, Unfinished, difference_image, image_errors
from virt_sse.disks.lifecycle import Disks
from virt_sse.disks.stored_images import usable
from virt_sse.errors import DiskInUseError, InvalidValueError
from virt_sse.in_guest.images import in_image
from virt_sse.keys.copy_chains import copies_below, refuse_other_size, unlocked_base
from virt_sse.keys.host import Host
from virt_sse.model.content import Content, Finding
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, NewDisk, StoragePool
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import conversion, image_file, unlocking
from virt_sse.qemu.conversion import CopySource
from virt_sse.qemu.difference import write_difference
from virt_sse.system.block_devices import is_device
from virt_sse.system.progress import Progress, silent
from virt_sse.system.rbd_names import is_rbd


class LiveCopies(LiveWrites, Protocol):
    """Copies of disks in running domains."""

    def domain_with(self, disk: Disk) -> str | None:
        """The name of the running domain with the disk; ``None`` without one, or if libvirt does not run."""

    def copy(
        self,
        domain: str,
        copies: Sequence[tuple[Disk, Unfinished]],
        *,
        quiesce: bool | None,
        progress: Progress,
    ) -> LiveCopied:
        """Copy disks of a running domain, all at the same point in time; see :meth:`Copies.copy`."""


@dataclass(frozen=True, slots=True)
class LiveCopied:
    """Complete copies of disks of a running domain.

    :ivar pause_seconds: how long the guest was paused or frozen.
    :ivar changed: bytes that were read, of each incremental copy made by a dirty bitmap alone. The images of
        all other copies have the whole content.
    """

    pause_seconds: float
    changed: Mapping[UUID, int]


@dataclass(frozen=True, slots=True)
class Increment:
    """How an incremental copy was made.

    :ivar base: the copy below.
    :ivar changed_bytes: what the image has: the clusters changed since.
    :ivar by_bitmap: whether a dirty bitmap told what changed, and nothing else was read; else the whole
        content was compared with that of the copy below.
    """

    base: Disk
    changed_bytes: int
    by_bitmap: bool


@dataclass(frozen=True, slots=True)
class Copied:
    """Complete copies.

    :ivar disks: the copies, in the order of the sources.
    :ivar increments: by copy, for incremental copies.
    :ivar full: by name, why a copy is a full copy although an incremental copy was wanted.
    :ivar domain: the running domain of the sources; ``None`` for sources not in use.
    :ivar pause_seconds: how long the guest was paused or frozen.
    :ivar seconds: duration of the whole copy.
    """

    disks: tuple[Disk, ...]
    domain: str | None
    pause_seconds: float
    seconds: float
    increments: Mapping[UUID, Increment]
    full: Mapping[str, str] = field(default_factory=dict)


class Copies:
    """Copies disks. No plaintext is written anywhere: qemu-img or the guest's QEMU decrypts and encrypts."""

    def __init__(self, host: Host, disks: Disks, live: LiveCopies) -> None:
        self._host = host
        self._store = host.store
        self._keys = host.keys
        self._freshness = host.freshness
        self._disks = disks
        self._live = live

    def copy(
        self,
        new: Sequence[NewDisk],
        *,
        quiesce: bool | None = None,
        progress: Progress = silent,
        complete: Callable[[Unfinished], None] = lambda _: None,
    ) -> Copied:
        """Copy disks, all at the same point in time, or none.

        :param new: the copies, each with its source. Without a size, a copy has the source's. Images of
            incremental copies are qcow2 images.
        :param quiesce: have the guest agent freeze the file systems of a running guest: ``None`` if an agent
            is connected, ``True`` always, ``False`` never.
        :param complete: called with each copy once its content is complete, before its image has its name.
        :raise DiskInUseError: When another command works on a source, a process outside libvirt has a source
            open, or a domain starts with a source meanwhile.
        :raise StaleImageError: When the image of a source is not the last known.
        :raise InvalidValueError: When the sources are in several domains, or the guest cannot freeze.
        :raise VirtSseError: As in :meth:`Disks.create`.
        """
        began = time.monotonic()
        pause = 0.0
        with ExitStack() as locks:
            sources = [
                self._disks.with_size_within(locks.enter_context(usable(self._host, each.source)))
                for each in new
                if each.source
            ]
            domain = self._domain_with(sources, quiesce=quiesce)
            if domain and any(isinstance(each.place, Path) and is_rbd(each.place) for each in new):
                raise InvalidValueError(
                    f"domain {domain!r} runs, and disks in use cannot be copied into Ceph",
                    hint="stop the domain, or copy into a file",
                )
            uses = [self._uses(source) for source in sources]
            for base in (each.base for each in new if each.base):
                locks.enter_context(usable(self._host, base))
                copies_below(self._host, base)
                self._freshness.check(base)
            new = [
                dataclasses.replace(each, size=each.size or source.size, source=source)
                for each, source in zip(new, sources, strict=True)
            ]
            with self._disks.unfinished(new, content=self._content(new)) as made:
                pairs = list(zip(sources, made, strict=True))
                increments = {}
                if domain is None:
                    for number, (source, target) in enumerate(pairs):
                        part = _part(progress, number, len(pairs))
                        if increment := self._copy_stopped(source, target, part):
                            increments[target.disk.id] = increment
                    for source, before in zip(sources, uses, strict=True):
                        if self._uses(source) != before:
                            raise DiskInUseError(f"a domain started with disk {source.name!r} meanwhile")
                else:
                    copied = self._live.copy(domain, pairs, quiesce=quiesce, progress=progress)
                    pause = copied.pause_seconds
                    for target in made:
                        if increment := self._reduced(target, copied.changed.get(target.disk.id), progress):
                            increments[target.disk.id] = increment
                for each in made:
                    with image_errors(each.disk):
                        complete(each)
        return Copied(
            tuple(self._store.get(str(each.disk.id)) for each in made),
            domain,
            pause,
            time.monotonic() - began,
            increments,
        )

    def _domain_with(self, sources: Sequence[Disk], *, quiesce: bool | None) -> str | None:
        """The running domain of the sources; ``None`` if no source is in use."""
        domains = {
            self._live.domain_with(source) if source.kind is DiskKind.DISK else None for source in sources
        }
        if len(domains) > 1:
            raise InvalidValueError("the disks are not all in one running domain")
        (domain,) = domains
        if domain is None:
            for source in sources:
                if source.kind is DiskKind.IMAGE:  # domains with linked clones read the image
                    image_file.refuse_if_written(source.path)
                else:
                    image_file.refuse_if_open(source.path)
            if quiesce:
                raise InvalidValueError(f"no running domain has disk {sources[0].name!r}: nothing to freeze")
        return domain

    def _uses(self, source: Disk) -> int | None:
        """The use counter of the image of *source*: each start and each end of a domain count.

        :raise StaleImageError: When the image is not the last known or a newer one.
        """
        carried = self._freshness.check(source)
        return carried.uses if carried else None

    def _content(self, new: Sequence[NewDisk]) -> Content | None:
        """The content of a copy, for policies about content new under a customer's key."""
        source = new[0].source
        if len(new) > 1 or source is None or source.encryption_type is not EncryptionType.PLATFORM_KEY:
            return None

        return self.findings_in(source)

    def findings_in(self, source: Disk) -> Content:
        """The content of a disk or copy, for policies; inspected on first use."""

        def look() -> Sequence[Finding]:
            deks, base = self._keys.unwrap_all(source), unlocked_base(self._host, source)
            return in_image(source.path, source.format, deks, base=base)

        return Content(look)

    def content_of(self, source: Disk) -> CopySource:
        """The content of a disk without a running domain, or of a copy with all copies below.

        :raise StaleImageError: When the inner LUKS header is not the last known, or a copy has another size.
        :raise VirtSseError: As :func:`unlocked_base`.
        """
        deks = self._keys.unwrap_all(source)
        headers = unlocking.validate(source.path, source.format, deks[1:])
        self._freshness.check_inner(source, headers, always_refuse=True)
        if source.kind is not DiskKind.DISK:
            refuse_other_size(source, deks)
        base = unlocked_base(self._host, source)
        return CopySource.encrypted(source.path, source.format, deks, base=base)

    def _copy_stopped(self, source: Disk, target: Unfinished, progress: Progress) -> Increment | None:
        content = self.content_of(source)
        if target.disk.base_id:
            return self._compared(target, content, target.image, progress)
        with image_errors(target.disk):
            conversion.copy_into(
                content,
                target.image,
                target.disk.format,
                target.deks,
                progress,
                is_new=True,
            )
        return None

    def _reduced(self, target: Unfinished, changed: int | None, progress: Progress) -> Increment | None:
        """Reduce the image of an incremental copy with the whole content to the changes.

        :param changed: given if the image has the changes alone already.
        """
        if target.disk.base_id is None:
            return None
        if changed is not None:
            return Increment(self._base(target), changed, by_bitmap=True)
        whole = CopySource.encrypted(target.image, target.disk.format, target.deks)
        reduced = difference_image(target.disk)
        with image_errors(target.disk):
            target.make(reduced)
            increment = self._compared(target, whole, reduced, progress)
            image_file.erase(target.image, target.disk.format)
            reduced.replace(target.image)
        return increment

    def _compared(
        self, target: Unfinished, content: CopySource, image: Path, progress: Progress
    ) -> Increment:
        base = self._base(target)
        with image_errors(target.disk):
            changed = write_difference(content, self.content_of(base), image, target.deks, progress)
        return Increment(base, changed, by_bitmap=False)

    def _base(self, target: Unfinished) -> Disk:
        return self._store.get(str(target.disk.base_id))


def new_copy(
    source: Disk,
    name: str,
    kind: DiskKind,
    *,
    encryption_set: str | None = None,
    image_format: DiskFormat | None = None,
    place: Path | StoragePool | None = None,
) -> NewDisk:
    """Describe a copy of *source*.

    :param encryption_set: name or id; default: the source's.
    :param image_format: default: the source's.
    :param place: as of :class:`NewDisk`; default: a disk in the configured folder, any other copy beside
        the source, or of a block device or an RBD image in the configured folder.
    """
    image_format = image_format or source.format
    if encryption_set is None and source.set_id:
        encryption_set = str(source.set_id)
    if place is None and kind is not DiskKind.DISK and not (is_device(source.path) or is_rbd(source.path)):
        place = source.path.with_name(f"{name}.{image_format.value}")
    return NewDisk(
        name=name,
        format=image_format,
        sku=source.sku,
        encryption_set=encryption_set,
        cipher=source.deks[0].cipher,
        infrastructure_cipher=source.deks[-1].cipher if len(source.deks) > 1 else None,
        place=place,
        kind=kind,
        source=source,
    )


def _part(progress: Progress, number: int, count: int) -> Progress:
    """The progress of one of several equal parts of the work."""
    return lambda fraction: progress((number + fraction) / count)

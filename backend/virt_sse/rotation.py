"""Key rotation: the same DEKs under another version of their KEK. No data is read, no guest notices."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from virt_sse import envelope
from virt_sse.disks import Disk, DiskState
from virt_sse.errors import DiskStateError, EnvelopeError, ImageError, VirtSseError
from virt_sse.keys import KeyRef
from virt_sse.locks import DiskLocks
from virt_sse.qemu import img
from virt_sse.store import Store
from virt_sse.wrapping import Wrapping


@dataclass(frozen=True, slots=True)
class RewrapReport:
    """What became of the disks under a key.

    :ivar rewrapped: how many got a new wrapped DEK, in the store or in their image.
    :ivar current: how many had it already.
    :ivar failed: by disk name, why it could not be done; their DEKs are as they were, and still good.
    """

    rewrapped: int
    current: int
    failed: dict[str, str]


class Rotation:
    """Rewraps DEKs. May be killed at any point: the next run goes on with what is left."""

    def __init__(self, store: Store, wrapping: Wrapping, locks: DiskLocks) -> None:
        self._store = store
        self._wrapping = wrapping
        self._locks = locks

    def rewrap(self, key: KeyRef, progress: Callable[[float], None]) -> RewrapReport:
        """Bring every disk under *key* to its current version, in the store and in the image's header.

        :raise KeyProviderError: When the provider cannot name the current version.
        """
        self._wrapping.current_key(key)
        disks = self._store.under_key(key)
        rewrapped = current = 0
        failed = {}
        for done, disk in enumerate(disks):
            progress(done / len(disks))
            try:
                if self._rewrap_disk(disk):
                    rewrapped += 1
                else:
                    current += 1
            except VirtSseError as exc:
                failed[disk.name] = str(exc)
        progress(1.0)
        return RewrapReport(rewrapped, current, failed)

    def _rewrap_disk(self, disk: Disk) -> bool:
        """Rewrap what is not under its key's current version; whether anything had to be done."""
        with self._locks.hold(disk.id):
            before = self._store.get(str(disk.id))
            if before.state is not DiskState.READY:
                raise DiskStateError(f"disk {disk.name!r} is {before.state.value}")
            deks = tuple(self._rewrap_entry(before, entry) for entry in before.deks)
            after = before
            if deks != before.deks:
                if not self._store.replace_deks(before, deks):
                    raise DiskStateError(f"disk {disk.name!r} was changed by another host at the same time")
                after = replace(before, deks=deks, generation=before.generation + 1)
            # Apart from the store, because a killed run may have come only so far.
            return self._update_envelope(after) or after is not before

    def _rewrap_entry(self, disk: Disk, entry: envelope.DekEntry) -> envelope.DekEntry:
        pinned = entry.wrapped.key
        current = self._wrapping.current_key(KeyRef(pinned.provider, pinned.name))
        if current == pinned:
            return entry
        context = disk.context(entry.slot)
        dek = self._wrapping.unwrap(entry.wrapped, context=context)
        return replace(entry, wrapped=self._wrapping.wrap(dek, current, context=context))

    def _update_envelope(self, disk: Disk) -> bool:
        """Make the image carry what the store has; whether it did not yet."""
        try:
            with img.opened(disk.path, os.O_RDWR) as descriptor:
                try:
                    carried = envelope.read(descriptor, disk.format)
                except EnvelopeError:
                    carried = None
                    # Damaged, or another image that was put here: that must not come to pass for ours.
                    entry = disk.deks[-1]
                    dek = self._wrapping.unwrap(entry.wrapped, context=disk.context(entry.slot))
                    img.check_unlocks(disk.path, disk.format, dek)
                if carried == disk.envelope:
                    return False
                if carried and carried.disk_id != disk.id:
                    raise ImageError(f"{disk.path} is the image of another disk than {disk.name!r}")
                envelope.write(descriptor, disk.format, disk.envelope)
                return True
        except ImageError as exc:
            raise ImageError(f"the image could not be brought up to the store: {exc}") from exc

"""Key rotation: the same DEKs under another KEK, or another version of it.

No data is read or written, and no guest notices.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from virt_sse.errors import (
    DiskStateError,
    EnvelopeError,
    ImageError,
    KeyDeniedError,
    PolicyError,
    VirtSseError,
)
from virt_sse.in_guest.images import in_image
from virt_sse.keys.access import Wrapping
from virt_sse.model import envelope
from virt_sse.model.content import Content
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import Dek, KeyId, KeyRef
from virt_sse.model.operations import MoveDisk
from virt_sse.plugins import PluginHost
from virt_sse.qemu import envelope_slots, img
from virt_sse.store import Store
from virt_sse.system.locks import DiskLocks

_AT_ONCE = 4
"""Disks that are rewrapped at the same time: most of it is waiting, for the key provider and for the disk."""


@dataclass(frozen=True, slots=True)
class RewrapReport:
    """What became of the DEKs of some disks, or VMs.

    :ivar rewrapped: how many got a new wrapped DEK, in the store or in their image.
    :ivar current: how many had it already.
    :ivar failed: by disk or VM, why it could not be done; their DEKs are as they were, and still good.
    """

    rewrapped: int
    current: int
    failed: dict[str, str]

    def __add__(self, other: RewrapReport) -> RewrapReport:
        return RewrapReport(
            self.rewrapped + other.rewrapped, self.current + other.current, self.failed | other.failed
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One wrapped DEK that was tried.

    :ivar place: ``store``, ``image slot A`` or ``image slot B``.
    :ivar problem: ``None`` when the set's present key, and that alone, unwraps it.
    """

    disk: str
    place: str
    key: KeyId | None
    problem: str | None


@dataclass(slots=True)
class _Targets:
    """The versions that keys have during one run, each asked for once."""

    wrapping: Wrapping
    _known: dict[tuple[KeyRef, EncryptionSet | None], KeyId] = field(default_factory=dict)

    def of(self, disk: Disk, position: int, encryption_set: EncryptionSet | None) -> KeyId:
        """What the DEK at *position* should be under: the first, the disk's own, under the key of its set."""
        pinned = disk.deks[position].wrapped.key
        key = encryption_set.key if encryption_set else KeyRef(pinned.provider, pinned.name)
        if (key, encryption_set) not in self._known:
            self._known[key, encryption_set] = self.wrapping.wrapping_key(key, encryption_set)
        return self._known[key, encryption_set]


class Rotation:
    """Rewraps DEKs. May be killed at any point: the next run goes on with what is left."""

    def __init__(self, store: Store, plugins: PluginHost, wrapping: Wrapping, locks: DiskLocks) -> None:
        self._store = store
        self._plugins = plugins
        self._wrapping = wrapping
        self._locks = locks

    def rewrap(self, disks: Sequence[Disk], progress: Callable[[float], None]) -> RewrapReport:
        """Bring *disks* under the present versions of their keys, in the store and in the images' headers."""
        targets = _Targets(self._wrapping)
        outcomes: dict[str, bool | str] = {}
        pool = ThreadPoolExecutor(_AT_ONCE, "rewrap")
        try:
            for disk, outcome in zip(
                disks, pool.map(lambda disk: self._try_rewrap(disk, targets), disks), strict=True
            ):
                outcomes[disk.name] = outcome
                progress(len(outcomes) / len(disks))
        finally:
            pool.shutdown(cancel_futures=True)
        return RewrapReport(
            rewrapped=sum(outcome is True for outcome in outcomes.values()),
            current=sum(outcome is False for outcome in outcomes.values()),
            failed={name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)},
        )

    def _try_rewrap(self, disk: Disk, targets: _Targets) -> bool | str:
        """Whether *disk* had to be rewrapped, and was; or why it could not be."""
        try:
            return self._rewrap_disk(disk, targets, move_to=None)
        except VirtSseError as exc:
            return str(exc)

    def move(self, disk: Disk, encryption_set: EncryptionSet) -> None:
        """Put *disk* into *encryption_set*, also while a domain has it: only its DEK's wrapping changes.

        :raise PolicyError: When it would need other layers of encryption, and so to be encrypted anew.
        :raise KeyProviderError: When its DEK cannot be unwrapped, or not be wrapped with the set's key.
        """
        before = self._plugins.encryption_layer(disk.encryption_type).name
        after = self._plugins.encryption_layer(encryption_set.encryption_type).name
        if before != after:
            raise PolicyError(
                f"disk {disk.name!r} has {before} encryption, set {encryption_set.name!r} is for {after}",
                hint="export it, and import it into the set",
            )
        content = Content(lambda: in_image(disk.path, disk.format, self._unwrap_all(disk, encryption_set)))
        self._plugins.validate(MoveDisk(disk, encryption_set, content))
        self._rewrap_disk(disk, _Targets(self._wrapping), move_to=encryption_set)

    def prove(self, disks: Sequence[Disk], progress: Callable[[float], None]) -> list[Finding]:
        """Try every wrapped DEK that there is of *disks*, and see which key it needs."""
        targets = _Targets(self._wrapping)
        findings = []
        for done, disk in enumerate(disks):
            progress(done / len(disks))
            findings += self._prove_disk(disk, targets)
        progress(1.0)
        return findings

    def _rewrap_disk(self, disk: Disk, targets: _Targets, *, move_to: EncryptionSet | None) -> bool:
        """Rewrap what is not under the key that it should be under; whether anything had to be done."""
        with self._locks.hold(disk.id):
            before = self._store.get(str(disk.id))
            if before.state is not DiskState.READY:
                raise DiskStateError(f"disk {disk.name!r} is {before.state.value}")
            encryption_set = move_to or self._set_of(before)
            deks = tuple(
                self._rewrap_entry(before, position, targets, encryption_set)
                for position in range(len(before.deks))
            )
            after = replace(
                before,
                deks=deks,
                encryption_set=encryption_set.id if encryption_set else None,
                encryption_type=encryption_set.encryption_type if encryption_set else before.encryption_type,
            )
            changed = after != before
            if changed:
                after = replace(after, generation=before.generation + 1)
                if not self._store.replace(before, after):
                    raise DiskStateError(f"disk {disk.name!r} was changed by another host at the same time")
            # Apart from the store, because a killed run may have come only so far.
            return self._update_envelope(after) or changed

    def _set_of(self, disk: Disk) -> EncryptionSet | None:
        return self._store.encryption_sets.get(str(disk.encryption_set)) if disk.encryption_set else None

    def _rewrap_entry(
        self, disk: Disk, position: int, targets: _Targets, encryption_set: EncryptionSet | None
    ) -> envelope.DekEntry:
        entry = disk.deks[position]
        if position:  # the platform's, see Disk.identity_for
            encryption_set = None
        target = targets.of(disk, position, encryption_set)
        set_id = encryption_set.id if encryption_set else None
        if target == entry.wrapped.key and set_id == disk.identity_for(entry.slot):
            return entry
        context = disk.context(entry.slot)
        dek = self._unwrap(disk, entry, encryption_set)
        wrapped = self._wrapping.wrap(dek, target, context=context, encryption_set=set_id)
        return replace(entry, wrapped=wrapped)

    def _unwrap(self, disk: Disk, entry: envelope.DekEntry, encryption_set: EncryptionSet | None) -> Dek:
        """With the identity of the disk's set; if that has lost its rights, of the set that it moves to."""
        context = disk.context(entry.slot)
        identity = disk.identity_for(entry.slot)
        try:
            return self._wrapping.unwrap(entry.wrapped, context=context, encryption_set=identity)
        except KeyDeniedError:
            if encryption_set is None or encryption_set.id == identity:
                raise
            return self._wrapping.unwrap(entry.wrapped, context=context, encryption_set=encryption_set.id)

    def _unwrap_all(self, disk: Disk, encryption_set: EncryptionSet) -> list[Dek]:
        """All DEKs of a disk that is to move to *encryption_set*, the guest's first."""
        own, *others = disk.deks
        return [
            self._unwrap(disk, own, encryption_set),
            *(self._unwrap(disk, entry, None) for entry in others),
        ]

    def _update_envelope(self, disk: Disk) -> bool:
        """Make the image carry what the store has; whether it did not yet."""
        try:
            with img.opened(disk.path, os.O_RDWR) as descriptor:
                try:
                    carried = envelope_slots.read(descriptor, disk.format)
                except EnvelopeError:
                    carried = None
                    # Damaged, or another image that was put here: that must not come to pass for ours.
                    img.check_unlocks(disk.path, disk.format, [self._unwrap(disk, disk.deks[-1], None)])
                if carried == disk.envelope:
                    return False
                if carried and carried.disk_id != disk.id:
                    raise ImageError(f"{disk.path} is the image of another disk than {disk.name!r}")
                envelope_slots.write(descriptor, disk.format, disk.envelope)
                return True
        except ImageError as exc:
            raise ImageError(f"the image could not be brought up to the store: {exc}") from exc

    def _prove_disk(self, disk: Disk, targets: _Targets) -> list[Finding]:
        places = [("store", disk.deks)]
        findings = []
        try:
            with img.opened(disk.path) as descriptor:
                for name, carried in envelope_slots.read_slots(descriptor, disk.format).items():
                    places.append((f"image slot {name}", carried.deks))
        except ImageError as exc:
            findings.append(Finding(disk.name, "image", None, str(exc)))
        encryption_set = self._set_of(disk)
        for place, deks in places:
            for position, entry in enumerate(deks):
                problem = None
                try:
                    target = targets.of(disk, position, encryption_set if position == 0 else None)
                    if entry.wrapped.key != target:
                        problem = f"needs this key, not {target}"
                    else:
                        self._wrapping.unwrap(
                            entry.wrapped,
                            context=disk.context(entry.slot),
                            encryption_set=disk.identity_for(entry.slot),
                        )
                except (VirtSseError, IndexError) as exc:
                    problem = str(exc)
                findings.append(Finding(disk.name, place, entry.wrapped.key, problem))
        return findings

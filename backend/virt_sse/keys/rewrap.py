"""Key rotation: rewraps DEKs with another version of their KEK, or with another KEK.

DEKs and data stay as they are; guests do not notice.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import UUID

from virt_sse.errors import (
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    EnvelopeError,
    ImageError,
    KeyDeniedError,
    PolicyError,
    StoreError,
    VirtSseError,
    VmStateError,
)
from virt_sse.in_guest.images import in_image
from virt_sse.keys.access import KeyAccess
from virt_sse.keys.freshness import with_images_envelope
from virt_sse.keys.host import Host
from virt_sse.model.content import Content
from virt_sse.model.disks import Disk, DiskState, state_error
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import Dek, KeyId, KeyRef, KeyState
from virt_sse.model.operations import MoveDisk
from virt_sse.model.vms import Vm, tpm_context
from virt_sse.qemu import envelope_slots, image_file, img
from virt_sse.system.marks import Marks
from virt_sse.system.progress import Progress, silent

_log = logging.getLogger(__name__)

_AT_ONCE = 4
"""Number of disks rewrapped in parallel; the time goes to waiting for key providers and storage."""


@dataclass(frozen=True, slots=True)
class RewrapReport:
    """The result of rewrapping the DEKs of disks and VMs.

    :ivar rewrapped: number of disks and VMs with a new wrapped DEK in the store or the image.
    :ivar current: number of disks and VMs already under the wanted version.
    :ivar failed: error message by disk or VM name; the old wrapped DEKs remain valid.
    """

    rewrapped: int
    current: int
    failed: dict[str, str]

    def __add__(self, other: RewrapReport) -> RewrapReport:
        return RewrapReport(
            self.rewrapped + other.rewrapped, self.current + other.current, self.failed | other.failed
        )


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A KEK version in use.

    :ivar set_id: the disk encryption set of the disks; its identity was used to query the state.
    :ivar deks: number of DEKs under this version.
    """

    key: KeyId
    set_id: UUID | None
    deks: int
    state: KeyState


@dataclass(frozen=True, slots=True)
class DekProof:
    """The result of looking at one stored copy of a wrapped DEK.

    :ivar disk: name of the disk; ``domain NAME`` for a saved state.
    :ivar place: ``store``, ``image slot A``, ``image slot B`` or ``saved state FILE``.
    :ivar problem: ``None`` if the current key of the set, and no other key, unwraps the copy.
    """

    disk: str
    place: str
    key: KeyId | None
    problem: str | None


class _PendingEnvelopes(Marks):
    """Marks of disks whose store and image are about to be updated one after the other.

    A mark that a killed command leaves behind spares the next command from opening all images.

    :ivar failed: marks of disks whose update failed, for the next rotation. Recovery leaves these disks
        alone: otherwise every command would wait for a storage that hangs.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.failed = Marks(folder.with_name("failed-envelopes"))

    @contextlib.contextmanager
    def marked(self, disk_id: UUID) -> Iterator[None]:
        """Mark a disk. The mark outlives the block if the process is killed or interrupted.

        If the block fails, the mark moves to :attr:`failed`; the caller reports the failure.

        :raise StoreError: When the mark cannot be made.
        """
        try:
            self.add(disk_id)
        except OSError as exc:
            raise StoreError(f"cannot mark disk {disk_id} in {self.folder}: {exc.strerror}") from exc
        try:
            yield
        except Exception:
            with contextlib.suppress(OSError):  # without room for a second mark, the first one stays
                self.failed.add(disk_id)
                super().remove(disk_id)
            raise
        self.remove(disk_id)

    def remove(self, disk_id: UUID) -> None:
        """Remove both marks of a disk, if any. A mark too many costs no more than a look at one image."""
        with contextlib.suppress(OSError):
            super().remove(disk_id)
            self.failed.remove(disk_id)

    def of_disks(self, disks: Collection[Disk]) -> set[UUID]:
        """The ids among *disks* with a mark, of either kind."""
        return {disk.id for disk in disks} & {*self.all(), *self.failed.all()}


def _reason(place: str, error: Exception) -> str:
    """The message of *error*. An unexpected error is logged with its traceback; its text is untrusted."""
    if isinstance(error, VirtSseError):
        return str(error)
    _log.error("%s: unexpected error", place, exc_info=error)
    return f"unexpected {type(error).__name__}"


@dataclass(slots=True)
class _Targets:
    """The wanted KEK version of each DEK; each KEK is queried once.

    :ivar only: the one KEK whose DEKs are rewrapped, and which is queried; ``None``: all.
    """

    keys: KeyAccess
    only: KeyRef | None = None
    _known: dict[tuple[KeyRef, EncryptionSet | None], KeyId] = field(default_factory=dict)

    def of(self, disk: Disk, position: int, encryption_set: EncryptionSet | None) -> KeyId:
        """The wanted version for the DEK at *position*; position 0 is under the key of the disk's set."""
        present = disk.deks[position].wrapped.key
        pinned = KeyRef(present.provider, present.name)
        if self.only is not None and pinned != self.only:
            return present
        key = encryption_set.key if encryption_set else pinned
        if (key, encryption_set) not in self._known:
            self._known[key, encryption_set] = self.keys.wrapping_key(key, encryption_set)
        return self._known[key, encryption_set]

    def are_met(self, disk: Disk, encryption_set: EncryptionSet | None) -> bool:
        """Whether a disk is at rest and all its DEKs are under the wanted versions; ``False`` if unknown."""
        try:
            return disk.state.is_at_rest and all(
                entry.wrapped.key == self.of(disk, position, None if position else encryption_set)
                for position, entry in enumerate(disk.deks)
            )
        except VirtSseError:  # reported for each disk by its own rewrap
            return False


class KeyRotation:
    """Rotates KEKs and rewraps the DEKs under them. A killed run is continued by the next.

    :param update_tpm_envelope: writes the wrapped DEK of a VM's TPM beside the TPM's state, if state exists.
    """

    def __init__(self, host: Host, update_tpm_envelope: Callable[[Vm], None]) -> None:
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = host.locks
        self._freshness = host.freshness
        self._opened_store = host.opened_store
        self._update_tpm_envelope = update_tpm_envelope
        self._pending = _PendingEnvelopes(host.config.pending_envelopes)

    def recover(self) -> None:
        """Write the envelopes of images whose store was updated by a command killed before the image.

        Disks locked by other commands are left alone. A failure is logged, and left to the next command.
        """
        for disk_id in self._pending.all():
            try:
                with self._locks.hold(disk_id):
                    disk = self._store.get(str(disk_id))
                    if disk.state.is_at_rest:
                        self._update_envelope(disk)
                    self._pending.remove(disk_id)
            except DiskInUseError:
                continue
            except DiskNotFoundError:
                self._pending.remove(disk_id)
            except Exception as exc:  # noqa: BLE001 -- one disk must not stop every command of the host
                _log.warning("disk %s: %s", disk_id, _reason(f"disk {disk_id}", exc))

    def in_use(self) -> list[KeyUse]:
        """Each KEK version in use by disks and VMs; one entry per disk encryption set."""
        used = Counter(self._store.keys_in_use())
        used.update({(key, None): deks for key, deks in self._store.vms.keys_in_use().items()})
        return [
            KeyUse(key, set_id, deks, self._keys.key_state(key, set_id=set_id))
            for (key, set_id), deks in used.items()
        ]

    def rotate(self, key: KeyRef, *, progress: Progress = silent) -> tuple[KeyId, RewrapReport]:
        """Create a new version of *key* and rewrap all DEKs under *key* with it.

        :raise KeyProviderError: When the provider refuses, or its keys are rotated elsewhere.
        """
        return self._keys.rotate(key), self._rewrap_all(key, progress, every_image=False)

    def rewrap(self, key: KeyRef, *, progress: Progress = silent) -> RewrapReport:
        """Rewrap all DEKs under *key* with its current version, e.g. after an interrupted rotation.

        Looks at every image, and mends damaged or outdated envelopes.

        :raise KeyProviderError: When the provider cannot name the current version.
        """
        self._keys.current_key(key)
        return self._rewrap_all(key, progress, every_image=True)

    def _rewrap_all(self, key: KeyRef, progress: Progress, *, every_image: bool) -> RewrapReport:
        disks = self._store.under_key(key)
        report = self.rewrap_disks(disks, progress, every_image=every_image, only=key)
        return report + self._rewrap_tpms(key)

    def rewrap_disks(
        self,
        disks: Sequence[Disk],
        progress: Progress,
        *,
        every_image: bool = False,
        only: KeyRef | None = None,
    ) -> RewrapReport:
        """Rewrap the DEKs of *disks* with the wanted versions of their keys, in the store and the images.

        :param every_image: also look at the images of disks which are current according to the store. By
            default, only the images left behind by a failed or killed update are opened.
        :param only: rewrap DEKs under this KEK only. The KEK of another layer of a disk may be unreachable.
        """
        targets = _Targets(self._keys, only)
        due = disks if every_image else self._due(disks, targets)
        outcomes: dict[str, bool | str] = {}
        pool = ThreadPoolExecutor(_AT_ONCE, "rewrap")
        try:
            for disk, outcome in zip(
                due, pool.map(lambda disk: self._try_rewrap(disk, targets), due), strict=True
            ):
                outcomes[disk.name] = outcome
                progress(len(outcomes) / len(due))
        finally:
            pool.shutdown(cancel_futures=True)
        return RewrapReport(
            rewrapped=sum(outcome is True for outcome in outcomes.values()),
            current=len(disks) - len(due) + sum(outcome is False for outcome in outcomes.values()),
            failed={name: outcome for name, outcome in outcomes.items() if isinstance(outcome, str)},
        )

    def _due(self, disks: Sequence[Disk], targets: _Targets) -> list[Disk]:
        """The disks to rewrap, without a look at any image: all but those current in store and image."""
        marked = self._pending.of_disks(disks)
        sets = {each.id: each for each in self._store.encryption_sets.all()}
        return [
            disk
            for disk in disks
            if disk.id in marked or not targets.are_met(disk, sets.get(disk.set_id) if disk.set_id else None)
        ]

    def _try_rewrap(self, disk: Disk, targets: _Targets) -> bool | str:
        """Rewrap one disk: whether anything changed, or the error message."""
        try:
            return self._rewrap_disk(disk, targets, move_to=None)
        except Exception as exc:  # noqa: BLE001 -- one disk must not stop the rotation
            return _reason(f"disk {disk.name!r}", exc)

    def move(self, disk: Disk, encryption_set: EncryptionSet) -> None:
        """Move *disk* into *encryption_set*, also while a domain uses the disk: rewraps its DEK.

        :raise PolicyError: When the set has other encryption layers, so the data would need re-encryption.
        :raise KeyProviderError: When the DEK cannot be unwrapped, or cannot be wrapped with the set's key.
        """
        before = self._plugins.encryption_layer(disk.encryption_type).name
        after = self._plugins.encryption_layer(encryption_set.encryption_type).name
        if before != after:
            raise PolicyError(
                f"disk {disk.name!r} has {before} encryption, set {encryption_set.name!r} is for {after}",
                hint=f"copy the disk: 'virt-sse disk copy {disk.name} NEW --des {encryption_set.name}'",
            )
        content = Content(lambda: in_image(disk.path, disk.format, self._unwrap_all(disk, encryption_set)))
        self._plugins.validate(MoveDisk(disk, encryption_set, content))
        self._rewrap_disk(disk, _Targets(self._keys), move_to=encryption_set)

    def _rewrap_tpms(self, key: KeyRef) -> RewrapReport:
        """Rewrap the DEKs of TPMs under *key* with its current version."""
        rewrapped = current = 0
        failed = {}
        for vm in self._store.vms.under_key(key):
            try:
                if self._rewrap_tpm(vm, key):
                    rewrapped += 1
                else:
                    current += 1
            except Exception as exc:  # noqa: BLE001 -- one TPM must not stop the rotation
                failed[f"TPM of {vm.name}"] = _reason(f"TPM of {vm.name!r}", exc)
        return RewrapReport(rewrapped, current, failed)

    def _rewrap_tpm(self, vm: Vm, key: KeyRef) -> bool:
        target = self._keys.current_key(key)
        if vm.tpm is None or vm.tpm.key == target:
            return False
        dek = self._keys.unwrap(vm.tpm, context=tpm_context(vm.id))
        wrapped = self._keys.wrap(dek, target, context=tpm_context(vm.id))
        if not self._store.vms.replace_tpm(vm.id, vm.tpm, wrapped):
            raise VmStateError(f"domain {vm.name!r} was changed by another command at the same time")
        self._update_tpm_envelope(replace(vm, tpm=wrapped))
        return True

    def prove(self, disks: Sequence[Disk], progress: Progress) -> list[DekProof]:
        """Unwrap every stored copy of the DEKs of *disks* with the wanted key version."""
        targets = _Targets(self._keys)
        proofs = []
        for done, disk in enumerate(disks):
            progress(done / len(disks))
            proofs += self._try_prove(disk, targets)
        progress(1.0)
        return proofs

    def _rewrap_disk(self, disk: Disk, targets: _Targets, *, move_to: EncryptionSet | None) -> bool:
        """Rewrap each DEK that is not under the wanted version: whether anything changed."""
        with self._locks.hold(disk.id):
            before = with_images_envelope(self._freshness, self._opened_store, self._store.get(str(disk.id)))
            if not (before.state.is_at_rest if move_to is None else before.state is DiskState.READY):
                raise state_error(before)
            encryption_set = move_to or self._set_of(before)
            deks = tuple(
                self._rewrap_entry(before, position, targets, encryption_set)
                for position in range(len(before.deks))
            )
            after = replace(
                before,
                deks=deks,
                set_id=encryption_set.id if encryption_set else None,
                encryption_type=encryption_set.encryption_type if encryption_set else before.encryption_type,
            )
            changed = after != before
            if changed:
                after = replace(after, generation=before.generation + 1)
                after.envelope.encode()  # refuses what has no room in the image
            with self._pending.marked(disk.id) if changed else contextlib.nullcontext():
                if changed and not self._store.replace(before, after):
                    raise DiskStateError(f"disk {disk.name!r} was changed by another host at the same time")
                # Independent of *changed*: a failed or killed run may have updated the store only.
                written = self._update_envelope(after)
            self._pending.remove(disk.id)
            return written or changed

    def _set_of(self, disk: Disk) -> EncryptionSet | None:
        return self._store.encryption_sets.get(str(disk.set_id)) if disk.set_id else None

    def _rewrap_entry(
        self, disk: Disk, position: int, targets: _Targets, encryption_set: EncryptionSet | None
    ) -> DekEntry:
        entry = disk.deks[position]
        if position:  # under the platform's key, see Disk.identity_for
            encryption_set = None
        target = targets.of(disk, position, encryption_set)
        set_id = encryption_set.id if encryption_set else None
        if target == entry.wrapped.key and set_id == disk.identity_for(entry.slot):
            return entry
        context = disk.context(entry.slot)
        dek = self._unwrap(disk, entry, encryption_set)
        wrapped = self._keys.wrap(dek, target, context=context, set_id=set_id)
        return replace(entry, wrapped=wrapped)

    def _unwrap(self, disk: Disk, entry: DekEntry, encryption_set: EncryptionSet | None) -> Dek:
        """Unwrap with the identity of the disk's set or, if access is denied, of the set it moves to."""
        context = disk.context(entry.slot)
        identity = disk.identity_for(entry.slot)
        try:
            return self._keys.unwrap(entry.wrapped, context=context, set_id=identity)
        except KeyDeniedError:
            if encryption_set is None or encryption_set.id == identity:
                raise
            return self._keys.unwrap(entry.wrapped, context=context, set_id=encryption_set.id)

    def _unwrap_all(self, disk: Disk, encryption_set: EncryptionSet) -> list[Dek]:
        """Unwrap all DEKs of a disk on its way to *encryption_set*, the guest's first."""
        own, *others = disk.deks
        return [
            self._unwrap(disk, own, encryption_set),
            *(self._unwrap(disk, entry, None) for entry in others),
        ]

    def _update_envelope(self, disk: Disk) -> bool:
        """Write the store's wrapped DEKs into the image's envelope: whether the image changed."""
        try:
            with image_file.opened(disk.path, os.O_RDWR) as descriptor:
                try:
                    carried = envelope_slots.read(descriptor, disk.format)
                except EnvelopeError:
                    carried = None
                    # The envelope is damaged, or this is a foreign image: the DEK must open it.
                    img.check_unlocks(disk.path, disk.format, [self._unwrap(disk, disk.deks[-1], None)])
                if carried == disk.envelope:
                    return False
                if carried and carried.disk_id != disk.id:
                    raise ImageError(f"{disk.path} is the image of another disk than {disk.name!r}")
                self._freshness.write_envelope(disk, descriptor)
                return True
        except ImageError as exc:
            raise ImageError(f"cannot update the envelope in the image: {exc}", hint=exc.hint) from exc

    def _try_prove(self, disk: Disk, targets: _Targets) -> list[DekProof]:
        try:
            return self._prove_disk(disk, targets)
        except Exception as exc:  # noqa: BLE001 -- one disk must not hide the proofs of the others
            return [DekProof(disk.name, "store", None, _reason(f"disk {disk.name!r}", exc))]

    def _prove_disk(self, disk: Disk, targets: _Targets) -> list[DekProof]:
        places = [("store", disk.deks)]
        proofs = []
        try:
            with image_file.opened(disk.path) as descriptor:
                for name, carried in envelope_slots.read_slots(descriptor, disk.format).items():
                    places.append((f"image slot {name}", carried.deks))
        except ImageError as exc:
            proofs.append(DekProof(disk.name, "image", None, str(exc)))
        encryption_set = self._set_of(disk)
        for place, deks in places:
            for position, entry in enumerate(deks):
                problem = None
                try:
                    target = targets.of(disk, position, encryption_set if position == 0 else None)
                    if entry.wrapped.key != target:
                        problem = f"needs this key, not {target}"
                    else:
                        self._keys.unwrap(
                            entry.wrapped,
                            context=disk.context(entry.slot),
                            set_id=disk.identity_for(entry.slot),
                        )
                except (VirtSseError, IndexError) as exc:
                    problem = str(exc)
                proofs.append(DekProof(disk.name, place, entry.wrapped.key, problem))
        return proofs

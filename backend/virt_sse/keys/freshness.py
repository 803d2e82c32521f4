"""The freshness of images: notices an image, a LUKS header or an envelope that is older than the last known.

Each use of an image, i.e. start, stop and change of the envelope, writes a seal with a higher use counter
(:mod:`virt_sse.model.seal`) into the image, and then the counter into a file of this host. A process killed
in between leaves an image ahead of the file. An authentic image with a higher counter is therefore accepted:
only hosts with the host key can write such an image.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from virt_sse.config import Config
from virt_sse.config.file import StaleImages
from virt_sse.errors import (
    CephError,
    DiskStateError,
    EnvelopeError,
    HostKeyError,
    ImageError,
    StaleImageError,
    VirtSseError,
)
from virt_sse.keys.image_state_files import HostKeyFile, ImageStateFiles
from virt_sse.model.disks import Disk
from virt_sse.model.envelope import Envelope
from virt_sse.model.image_states import ImageState
from virt_sse.model.seal import SealKey
from virt_sse.qemu import envelope_slots, image_file
from virt_sse.qemu.envelope_slots import CarriedEnvelope
from virt_sse.qemu.volume_header import VolumeHeader
from virt_sse.system.locks import DiskLocks
from virt_sse.system.rbd_names import is_rbd

if TYPE_CHECKING:
    from virt_sse.store import LazyStore

_log = logging.getLogger(__name__)

_TIME = "%Y-%m-%d %H:%M UTC"


@dataclass(frozen=True, slots=True)
class _Examined:
    """An image compared with its last known state.

    :ivar carried: ``None`` without a readable envelope.
    :ivar state: ``None`` before the first use.
    :ivar problem: the reason why the image is not the last known or a newer one.
    """

    carried: CarriedEnvelope | None
    state: ImageState | None
    problem: str | None

    @property
    def next_use(self) -> int:
        carried = self.carried.uses if self.carried else None
        return max(carried or 0, self.state.uses if self.state else 0) + 1


class ImageFreshness:
    """Seals the images of a host and compares them with their last known states.

    A lock per disk, held for single reads and writes of the seals only, orders concurrent processes.
    """

    def __init__(self, config: Config) -> None:
        self.host_key = HostKeyFile(config.state_directory / "host.key")
        self._states = ImageStateFiles(config.image_states)
        self._locks = DiskLocks(config.state_directory / "image-states.lock")
        self._policy = config.stale_images

    @cached_property
    def key(self) -> SealKey:
        """The key of the seals; made at the first use.

        :raise HostKeyError: When the host key cannot be read or made.
        """
        self.host_key.provision()
        key = self.host_key.load()
        if key is None:
            raise HostKeyError(f"the host key {self.host_key.path} was removed")
        return key

    def carried_by(self, path: Path) -> CarriedEnvelope:
        """The envelope in the image at *path*, an authentic envelope before any other.

        :raise ImageError: When image or envelope cannot be read.
        """
        with image_file.opened(path) as descriptor:
            return envelope_slots.read_sealed(descriptor, image_file.probe_format(descriptor), self.key)

    def refuse_untrusted(self, path: Path, carried: CarriedEnvelope) -> None:
        """Refuse an image from elsewhere, older than the last known image of the disk, or of a deleted disk.

        :raise StaleImageError: When the image is not authentic, or is such an image.
        """
        state = self._states.get(carried.envelope.disk_id)
        hint = "pass --trust if you know where the image comes from"
        if state and state.deleted:
            problem = f"is of a disk that was deleted on this host, at {state.deleted:{_TIME}}"
            hint = "to bring the disk back on purpose, e.g. from a backup, pass --trust"
        elif carried.uses is None:
            problem = "was sealed by another host" if carried.foreign else "has no seal of this host"
        elif state and carried.uses < state.uses:
            problem = f"is older than the last known, use {carried.uses} of {state.uses}"
        else:
            return
        raise StaleImageError(f"the envelope of {path} {problem}", hint=hint)

    def seal_new(self, descriptor: int, disk: Disk) -> None:
        """Write the first envelope into the open image of a new disk.

        :raise ImageError: When the image cannot be written.
        """
        envelope_slots.write(descriptor, disk.format, disk.envelope, (self.key, 1))

    def has_sealed(self, disk: Disk) -> bool:
        """Whether the disk's image has the disk's envelope, with a seal of this host, and is not stale.

        :raise HostKeyError: When the host key cannot be read.
        """
        try:
            found = self.check(disk)
        except ImageError:
            return False
        return found is not None and found.uses is not None and found.envelope == disk.envelope

    def used_here(self) -> Iterator[UUID]:
        """The disks whose images were in use on this host."""
        return self._states.disk_ids()

    def note_new(self, disk: Disk) -> None:
        """Record the state of a complete new image, unless known.

        :raise VirtSseError: When the image cannot be read or the state cannot be written.
        """
        with self._locks.hold(disk.id, wait=True):
            if self._states.get(disk.id) is None and (uses := (carried := self.carried_by(disk.path)).uses):
                self._states.put(disk.id, ImageState(uses, carried.header))

    def note_deleted(self, disk: Disk) -> None:
        """Note that the disk is deleted: copies of its image then need trust. A failure is logged."""
        try:
            with self._locks.hold(disk.id, wait=True):
                self._states.mark_deleted(disk.id)
        except VirtSseError as exc:
            _log.warning("the deletion of disk %s is not noted: %s", disk.id, exc)

    def is_ahead(self, disk: Disk) -> bool:
        """Whether the disk's image was used after the last use known here, i.e. on another host.

        :raise StaleImageError: When the image is not the last known or a newer one.
        :raise ImageError: When the image cannot be read.
        """
        carried, state = self.check(disk), self._states.get(disk.id)
        return bool(carried and state and (carried.uses or 0) > state.uses)

    def check(self, disk: Disk) -> CarriedEnvelope | None:
        """Compare the disk's image with its last known state; changes nothing.

        :return: the image's envelope; ``None`` without a readable envelope.
        :raise StaleImageError: When the image is not the last known or a newer one.
        :raise ImageError: When the image cannot be read.
        """
        with self._locks.hold(disk.id, wait=True), image_file.opened(disk.path) as descriptor:
            found = self._examine(disk, descriptor)
        if found.problem:
            raise _stale(disk, found.problem)
        return found.carried

    def begin_use(self, disk: Disk, *, is_elsewhere: bool = False) -> Envelope | None:
        """Compare the disk's image with its last known state, and count a use of the image.

        An image that this host cannot write is compared only: its guest cannot write either.

        :param is_elsewhere: whether another host has the image in use and counts: its state is noted.
        :return: the image's envelope if authentic.
        :raise StaleImageError: When the image is not the last known or a newer one, and policy refuses.
        :raise ImageError: When the image cannot be read or written.
        """
        is_writable = not is_elsewhere and (is_rbd(disk.path) or os.access(disk.path, os.W_OK))
        flags = os.O_RDWR if is_writable else os.O_RDONLY
        with self._locks.hold(disk.id, wait=True), image_file.opened(disk.path, flags) as descriptor:
            found = self._examine(disk, descriptor)
            if found.problem:
                self._refuse(disk, found.problem)
                return None
            if found.carried is None:
                return None
            if is_writable:
                self._count_use(disk, descriptor, found, found.carried)
            elif is_elsewhere and found.carried.uses is not None:
                inner = found.state.inner if found.state else None
                self._states.put(disk.id, ImageState(found.carried.uses, found.carried.header, inner))
            return found.carried.envelope

    def _count_use(self, disk: Disk, descriptor: int, found: _Examined, carried: CarriedEnvelope) -> None:
        sealing = (self.key, found.next_use)
        envelope_slots.advance(descriptor, disk.format, carried.envelope, sealing)
        inner = found.state.inner if found.state else None
        self._states.put(disk.id, ImageState(found.next_use, carried.header, inner))

    def check_inner(
        self, disk: Disk, headers: Sequence[VolumeHeader], *, always_refuse: bool = False
    ) -> None:
        """Compare the header of the innermost of nested volumes with the last known; note the first seen.

        :param headers: of the disk's volumes, innermost first.
        :param always_refuse: whatever the policy says.
        :raise StaleImageError: When the headers differ, and policy refuses.
        """
        digest = _inner(headers)
        with self._locks.hold(disk.id, wait=True):
            state = self._states.get(disk.id)
            if digest and state and state.inner is None and not state.deleted:
                self._states.put(disk.id, replace(state, inner=digest))
                return
        try:
            self.compare_inner(disk, headers)
        except StaleImageError as exc:
            if always_refuse or self._policy is StaleImages.REFUSE:
                raise
            _log.warning("%s", exc)

    def compare_inner(self, disk: Disk, headers: Sequence[VolumeHeader]) -> None:
        """Compare the header of the innermost of nested volumes with the last known; changes nothing.

        :param headers: of the disk's volumes, innermost first.
        :raise StaleImageError: When the headers differ.
        """
        digest, state = _inner(headers), self._states.get(disk.id)
        if digest and state and state.inner not in (None, digest):
            raise _stale(
                disk, "the LUKS header of the inner layer was changed by something else than virt-sse"
            )

    def end_use(self, disk_id: UUID, path: Path) -> None:
        """Count the end of a use: older copies made during the use are then noticed. Failures are logged.

        :param path: of the image; a file that is no authentic image of the disk stays untouched.
        """
        try:
            key = self.host_key.load()
            if key is None:
                return
            with self._locks.hold(disk_id, wait=True), image_file.opened(path, os.O_RDWR) as descriptor:
                image_format = image_file.probe_format(descriptor)
                carried = envelope_slots.read_sealed(descriptor, image_format, key)
                state = self._states.get(disk_id)
                if state is None or carried.uses is None or carried.envelope.disk_id != disk_id:
                    return
                if state.deleted:
                    return
                if carried.uses < state.uses:
                    return
                envelope_slots.advance(descriptor, image_format, carried.envelope, (key, carried.uses + 1))
                self._states.put(disk_id, ImageState(carried.uses + 1, carried.header, state.inner))
        except EnvelopeError:
            return  # no image of the disk, e.g. an overlay
        except VirtSseError as exc:
            _log.warning("the end of the use of disk %s is not counted: %s", disk_id, exc)

    def write_envelope(self, disk: Disk, descriptor: int) -> None:
        """Write the disk's envelope into the open image, and count the change.

        :raise StaleImageError: When the image is not the last known or a newer one, and policy refuses.
        :raise ImageError: When the image cannot be written.
        """
        with self._locks.hold(disk.id, wait=True):
            found = self._examine(disk, descriptor)
            is_foreign = found.carried is not None and found.carried.foreign
            if found.problem and (found.state or is_foreign):
                self._refuse(disk, found.problem)
                envelope_slots.write(descriptor, disk.format, disk.envelope)
                return
            self._seal(disk, descriptor, found, found.state.inner if found.state else None)

    def trust(self, disk: Disk, headers: Sequence[VolumeHeader]) -> None:
        """Take the image of the disk as it is for the newest, with the store's envelope.

        The caller checks that the DEK opens the image.

        :param headers: of the image's volumes, innermost first.
        :raise ImageError: When the image cannot be read or written, or is the image of another disk.
        """
        with self._locks.hold(disk.id, wait=True), image_file.opened(disk.path, os.O_RDWR) as descriptor:
            self._seal(disk, descriptor, self._examine(disk, descriptor), _inner(headers))

    def _seal(self, disk: Disk, descriptor: int, found: _Examined, inner: bytes | None) -> None:
        sealing = (self.key, found.next_use)
        envelope_slots.write(descriptor, disk.format, disk.envelope, sealing)
        sealed = envelope_slots.read_sealed(descriptor, disk.format, self.key)
        self._states.put(disk.id, ImageState(found.next_use, sealed.header, inner))

    def _examine(self, disk: Disk, descriptor: int) -> _Examined:
        """Compare the open image with the last known state.

        :raise ImageError: When the image cannot be read, or is the image of another disk.
        """
        state = self._states.get(disk.id)
        try:
            carried = envelope_slots.read_sealed(descriptor, disk.format, self.key)
        except EnvelopeError as exc:
            return _Examined(None, state, str(exc) if state else None)
        if carried.envelope.disk_id != disk.id:
            raise ImageError(f"{disk.path} is the image of another disk than {disk.name!r}")
        return _Examined(carried, state, _problem(disk, carried, state))

    def _refuse(self, disk: Disk, problem: str) -> None:
        error = _stale(disk, problem)
        if self._policy is StaleImages.REFUSE:
            raise error
        _log.warning("%s", error)


def _inner(headers: Sequence[VolumeHeader]) -> bytes | None:
    """Digest of the innermost header; ``None`` without nested volumes, whose only header is in the seal."""
    return headers[0].digest if len(headers) > 1 else None


def with_newer_envelope(store: LazyStore, disk: Disk, carried: Envelope) -> Disk:
    """Take over an authentic envelope that is newer than the store's, into the store.

    Another host with the same host key rotated a key, or the store was restored from a backup.

    :return: the disk as stored.
    :raise DiskStateError: When the envelope is of another encryption type, or the disk changed meanwhile.
    """
    if carried.has_same_keys(disk.envelope) or carried.generation < disk.generation:
        return disk
    newer = replace(disk, deks=carried.deks, generation=carried.generation)
    if carried.encryption_type is not disk.encryption_type or not store.full().replace(disk, newer):
        raise DiskStateError(f"disk {disk.name!r} was changed by another host at the same time")
    return newer


def with_images_envelope(freshness: ImageFreshness, store: LazyStore, disk: Disk) -> Disk:
    """Take over the image's envelope if authentic and newer than the store's, into the store.

    An image that cannot be read, or is not the last known, changes nothing: the user of the image refuses the
    image.

    :return: the disk as stored.
    :raise DiskStateError: As for :func:`with_newer_envelope`.
    """
    try:
        found = freshness.check(disk)
    except (ImageError, CephError, HostKeyError):
        return disk
    if found is None or found.uses is None:
        return disk
    return with_newer_envelope(store, disk, found.envelope)


def _problem(disk: Disk, carried: CarriedEnvelope, state: ImageState | None) -> str | None:
    """The reason why an image is not the last known or a newer one, if any."""
    if state and state.deleted:
        return f"a copy of the image of a disk that was deleted at {state.deleted:{_TIME}}"
    if carried.uses is not None:
        if state and carried.uses < state.uses:
            return f"an older copy of the image, use {carried.uses} of {state.uses}"
        if state is None and carried.envelope.generation < disk.generation:
            return "an older copy of the image, with keys from before a rotation"
        return None
    if state and carried.header != state.header:
        return "the LUKS header was changed by something else than virt-sse"
    if carried.foreign:
        return "the envelope was sealed with the host key of another host"
    if state is None and carried.envelope.has_same_keys(disk.envelope):
        return None  # made before images had seals
    return "the envelope has no valid seal of this host"


def _stale(disk: Disk, problem: str) -> StaleImageError:
    return StaleImageError(
        f"{disk.path} is not the last known image of disk {disk.name!r}: {problem}",
        hint=f"if the image was restored on purpose, run 'virt-sse disk trust {disk.name}'",
    )

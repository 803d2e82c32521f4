"""Adoption of images into the store: a disk whose store was lost, a moved image, an image from elsewhere.

Storage may have written any part of an image: the envelope is compared with the seal, with the layers of the
disk's encryption type, and with the LUKS headers, before the image gets a seal of this host.
"""

from __future__ import annotations

import dataclasses
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from virt_sse.disks.creation import Creation
from virt_sse.disks.stored_images import usable
from virt_sse.errors import (
    DiskExistsError,
    DiskNotFoundError,
    EncryptionSetNotFoundError,
    EnvelopeError,
    ImageError,
    InvalidValueError,
    PolicyError,
    StaleImageError,
)
from virt_sse.in_guest.images import in_image
from virt_sse.keys.access import TRUST
from virt_sse.keys.copy_chains import unlocked_base
from virt_sse.keys.encryption_sets import EncryptionSets, refuse_moved
from virt_sse.keys.freshness import with_newer_envelope
from virt_sse.keys.host import Host
from virt_sse.model.content import Content
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskState, check_name, check_path, state_error
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.envelope import Envelope
from virt_sse.model.keys import Dek, KeyRef
from virt_sse.model.layers import EncryptionType, LayerChoice
from virt_sse.model.operations import CreateDisk
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.qemu import image_file, img, unlocking
from virt_sse.qemu.envelope_slots import CarriedEnvelope
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.qemu.volume_header import VolumeHeader

_CHANGED = "the envelope was changed: restore the image from a backup"


class Adoption:
    """Adopts images, and takes images as they are for the newest."""

    def __init__(self, host: Host, sets: EncryptionSets, creation: Creation) -> None:
        self._host = host
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._locks = host.locks
        self._freshness = host.freshness
        self._sets = sets
        self._creation = creation

    def adopt(
        self, path: Path, *, name: str | None = None, encryption_set: str | None = None, trust: bool = False
    ) -> Disk:
        """Add the disk with the image at *path* to the store, from the envelope in the image.

        If the store knows the disk by another path and no image is left there, the store takes the new path,
        and the disk keeps its name and encryption set.

        :param name: default: the name in the envelope.
        :param encryption_set: name or id; default: the set in the envelope.
        :param trust: take over an image without a valid seal of this host, an older image, or the image of a
            deleted disk; audited.
        :raise StaleImageError: When the image is such an image, without *trust*.
        :raise ImageFormatError: When the image is not encrypted, or the DEK does not open the image.
        :raise EnvelopeError: When the envelope cannot be read, or has other layers than its type, or other
            ciphers than the LUKS headers.
        :raise EncryptionSetNotFoundError: When the store lacks the set in the envelope and no set is given.
        :raise DiskNotFoundError: When the image is a linked clone of an image that the store does not have.
        :raise DiskExistsError: When the store has the disk, the name or the path.
        :raise InvalidValueError: When *name* is invalid, or a known disk has another name or set.
        :raise KeyProviderError: When the DEK cannot be unwrapped, e.g. because it is under another host's
            key.
        """
        given = self._sets.usable(encryption_set) if encryption_set is not None else None
        path = check_path(path)
        found = self._freshness.carried_by(path)
        if any(entry.slot == TEMP_SLOT for entry in found.envelope.deks):
            raise ImageError(f"{path} is the temporary disk of a VM; it is erased when the VM ends")
        if not found.envelope.deks:
            raise EnvelopeError(f"the envelope of {path} holds no DEK")
        with self._locks.hold(found.envelope.disk_id):
            try:
                known = self._store.get(str(found.envelope.disk_id))
            except DiskNotFoundError:
                return self._adopt_new(path, found, name, given, trust=trust)
            return self._adopt_moved(known, path, found, name, given, trust=trust)

    def _adopt_new(
        self,
        path: Path,
        found: CarriedEnvelope,
        name: str | None,
        given: EncryptionSet | None,
        *,
        trust: bool,
    ) -> Disk:
        carried = found.envelope
        disk = Disk(
            id=carried.disk_id,
            name=check_name(name or carried.name, carried.kind),
            path=path,
            format=found.format,
            size=0,  # unknown until unlocked
            state=DiskState.CREATING,
            encryption_type=carried.encryption_type,
            created=carried.created,
            generation=carried.generation,
            deks=carried.deks,
            set_id=self._set_of(carried, given),
            kind=carried.kind,
            source_id=carried.source_id or carried.base_id,
            origin_id=carried.base_id,
            base_id=carried.base_id,
        )
        disk, headers = self._checked(disk, found, trust=trust)
        self._store.add(disk, is_adopted=True)
        try:
            self._take(disk, found, headers, trust=trust)
        finally:
            self._creation.settle([disk])
        return self._store.get(str(disk.id))

    def _adopt_moved(
        self,
        known: Disk,
        path: Path,
        found: CarriedEnvelope,
        name: str | None,
        given: EncryptionSet | None,
        *,
        trust: bool,
    ) -> Disk:
        if known.path == path or image_file.exists(known.path):
            raise DiskExistsError(f"the store has this disk as {known.name!r}, at {known.path}")
        if not known.state.is_at_rest:
            raise state_error(known)
        if name not in (None, known.name):
            raise InvalidValueError(
                f"the store has this disk as {known.name!r}", hint="leave out --name: the disk keeps its name"
            )
        if given and given.id != known.set_id:
            raise InvalidValueError(
                f"disk {known.name!r} is not in encryption set {given.name!r}",
                hint=f"leave out --des; then run 'virt-sse disk update {known.name} --des {given.name}'",
            )
        if found.format is not known.format:
            raise ImageError(f"{path} is a {found.format.value} image, disk {known.name!r} is not")
        disk = dataclasses.replace(known, path=path)
        if found.uses is not None:
            disk = with_newer_envelope(self._host.opened_store, disk, found.envelope)
        disk, headers = self._checked(disk, found, trust=trust)
        self._take(disk, found, headers, trust=trust)
        self._freshness.note_new(disk)
        self._store.set_path(disk.id, path)
        return self._store.get(str(disk.id))

    def _checked(
        self, disk: Disk, found: CarriedEnvelope, *, trust: bool
    ) -> tuple[Disk, Sequence[VolumeHeader]]:
        """Check an image to be adopted as *disk*; nothing is changed.

        :return: the disk with its size, and the headers of its volumes.
        """
        if not trust:
            self._freshness.refuse_untrusted(disk.path, found)
        disk.envelope.encode()  # refuses a name that has no room in the image
        self._check_layers(disk)
        if disk.set_id:
            refuse_moved(disk, self._sets.get(str(disk.set_id)), self._host.config)
        deks = self._keys.unwrap_all(disk)
        img.check_unlocks(disk.path, disk.format, deks)
        headers = unlocking.validate(disk.path, disk.format, deks[1:])
        _check_ciphers(disk, headers)
        base = unlocked_base(self._host, disk) if disk.is_linked_clone else None
        disk = dataclasses.replace(disk, size=img.usable_size_within(disk.path, disk.format, deks))
        self._validate(disk, deks, base)
        return disk, headers

    def _validate(self, disk: Disk, deks: Sequence[Dek], base: BaseImage | None) -> None:
        content = Content(
            lambda: in_image(disk.path, disk.format, deks, base=base or unlocked_base(self._host, disk))
        )
        self._plugins.validate(
            CreateDisk(
                disk.name,
                disk.size,
                disk.path,
                disk.format,
                disk.encryption_type,
                disk.key,
                content,
                kind=disk.kind,
            )
        )

    def _take(
        self, disk: Disk, found: CarriedEnvelope, headers: Sequence[VolumeHeader], *, trust: bool
    ) -> None:
        """Give the image the disk's envelope and a seal of this host, if either is missing."""
        if trust:
            self._keys.note(TRUST, disk, f"adopted from {disk.path}, {found.authenticity}")
            self._freshness.trust(disk, headers)
        elif disk.envelope != found.envelope:
            with image_file.opened(disk.path, os.O_RDWR) as descriptor:
                self._freshness.write_envelope(disk, descriptor)

    def trust(self, name: str) -> Disk:
        """Take a disk's image as it is for the newest, e.g. after a restore from a backup; audited.

        The image must open with the DEKs in the store, and gets the store's envelope. A disk in state
        ``receiving`` becomes ready: the caller says that the migration has copied the whole content.

        :raise ImageError: When the image does not open, or is the image of another disk.
        :raise DiskInUseError: When a migration copies content to the disk.
        :raise KeyProviderError: When a DEK cannot be unwrapped.
        """
        with usable(self._host, self._store.get(name), DiskState.READY, DiskState.RECEIVING) as current:
            if current.state is DiskState.RECEIVING:
                image_file.refuse_if_open(current.path)
            deks = self._keys.unwrap_all(current)
            img.check_unlocks(current.path, current.format, deks)
            try:
                self._freshness.check(current)
                reason = "the last known image"
            except StaleImageError as exc:
                reason = str(exc)
            self._keys.note(TRUST, current, reason)
            self._freshness.trust(current, unlocking.validate(current.path, current.format, deks[1:]))
            if current.state is DiskState.RECEIVING:
                self._store.set_received(current.id)
        return self._store.get(str(current.id))

    def _check_layers(self, disk: Disk) -> None:
        """Compare the DEKs of an adopted disk with the plan of its encryption type.

        Whoever can write to the image chooses the type, the slots and the ciphers in the envelope.

        :raise EnvelopeError: When slots, ciphers or keys differ from the plan.
        """
        differs = EnvelopeError(
            f"the layers in the envelope of {disk.path} are not those of {disk.encryption_type.value}",
            hint=_CHANGED,
        )
        layer = self._plugins.encryption_layer(disk.encryption_type)
        try:
            plan = layer.plan(LayerChoice(disk.key, disk.deks[-1].cipher, cipher=disk.deks[0].cipher))
        except PolicyError as exc:
            raise differs from exc
        planned = [(spec.slot, spec.cipher, spec.key) for spec in plan.deks]
        found = [(e.slot, e.cipher, KeyRef(e.wrapped.key.provider, e.wrapped.key.name)) for e in disk.deks]
        is_platform = disk.encryption_type is EncryptionType.PLATFORM_KEY
        if found != planned or (is_platform and disk.key != PLATFORM_KEY):
            raise differs

    def _set_of(self, carried: Envelope, given: EncryptionSet | None) -> uuid.UUID | None:
        """The id of the encryption set of an adopted disk."""
        if given or not carried.set_id:
            return given.id if given else None
        try:
            return self._store.encryption_sets.get(str(carried.set_id)).id
        except EncryptionSetNotFoundError as exc:
            raise EncryptionSetNotFoundError(
                f"the disk was in encryption set {carried.set_id}, which the store does not have",
                hint="pass --des with a set that may use the disk's key",
            ) from exc


def _check_ciphers(disk: Disk, headers: Sequence[VolumeHeader]) -> None:
    """Compare the ciphers in the envelope with the ciphers in the LUKS headers.

    :raise EnvelopeError: When the ciphers differ.
    """
    for entry, header in zip(disk.deks, headers, strict=True):
        if entry.cipher != header.cipher:
            raise EnvelopeError(
                f"the envelope of {disk.path} states {entry.cipher} for slot {entry.slot!r},"
                f" but the LUKS header has {header.cipher}",
                hint=_CHANGED,
            )

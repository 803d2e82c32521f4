"""The one façade that the command line, the libvirt hook and tests call."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import Component
from virt_sse.config import Config
from virt_sse.disks.inspector import Inspector
from virt_sse.disks.lifecycle import Provisioning
from virt_sse.disks.transfer import Transfer
from virt_sse.domains import temp_disks
from virt_sse.domains.hotplug import Domains
from virt_sse.domains.settings import VirtualMachines
from virt_sse.domains.start import Serving
from virt_sse.errors import DiskInUseError, ImageError, InvalidValueError, PolicyError
from virt_sse.host.setup import initialise
from virt_sse.keys.access import Wrapping
from virt_sse.keys.encryption_sets import SetProvisioning
from virt_sse.keys.rewrap import RewrapReport, Rotation
from virt_sse.libvirt.pools import pool_folder, refresh_pool
from virt_sse.model.ciphers import Cipher
from virt_sse.model.content import Finding
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskSku, check_name
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import KeyId, KeyRef, KeyState
from virt_sse.model.layers import HostCaching
from virt_sse.plugins import PluginHost
from virt_sse.qemu import envelope_slots, img
from virt_sse.stages import Stages
from virt_sse.store import Store
from virt_sse.system.locks import DiskLocks
from virt_sse.system.progress import Progress, silent
from virt_sse.verification.verification import Verification


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A KEK version that disks are under.

    :ivar encryption_set: the id of the set that they are in, with whose identity the state was asked for.
    :ivar deks: how many of their DEKs are.
    """

    key: KeyId
    encryption_set: UUID | None
    deks: int
    state: KeyState


class Backend:
    """All that virt-sse does on a host. Finishes first what a killed command left half-done.

    :param component: in whose name the uses of keys are recorded.
    :raise StoreError: When the store cannot be opened.
    :raise PluginError: When a required plugin is broken.
    """

    def __init__(
        self, config: Config, plugins: PluginHost | None = None, *, component: Component = Component.HOST
    ) -> None:
        self.config = config
        self.plugins = plugins or PluginHost(config)
        self._store = Store(config.store_url)
        locks = DiskLocks(config.state_directory / "disks.lock")
        wrapping = self._wrapping = Wrapping(self.plugins, AuditLog.of_host(config), component=component)
        self._provisioning = Provisioning(
            self._store, self.plugins, wrapping, locks, config.infrastructure_cipher
        )
        self.inspector = Inspector(config.libvirt_uri, self._store, wrapping)
        self._transfer = Transfer(self.plugins, self._provisioning)
        self._rotation = Rotation(self._store, self.plugins, wrapping, locks)
        self.sets = SetProvisioning(config, self._store, self.plugins, wrapping, self._rotation)
        self.stages = Stages(config)
        serving = Serving(config, self._store, self.plugins, wrapping, self.stages)
        self.domains = Domains(config.libvirt_uri, self.plugins, serving, self.stages)
        self.vms = VirtualMachines(config, self._store, self.plugins, wrapping, serving, self.inspector)
        self.verification = Verification(config, self._store, self.plugins, wrapping, serving, self.vms)
        try:
            temp_disks.erase_of_other_boots(config)
            self._provisioning.recover()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(cls, root: Path | None = None) -> Self:
        """The backend of the host whose files lie under *root*; see :meth:`Config.load`."""
        return cls(Config.load(root))

    def close(self) -> None:
        """Let go of the store and the key providers."""
        self._store.close()
        self.plugins.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def init_host(self) -> list[str]:
        """Make what a host needs and does not have: what was made, in words.

        :raise VirtSseError: By meaning; see :func:`virt_sse.host.setup.initialise`.
        """
        return initialise(self.config, self.plugins, self._store)

    # Disks

    def create_disk(
        self,
        name: str,
        size: int,
        *,
        image_format: DiskFormat = DiskFormat.QCOW2,
        sku: DiskSku = DiskSku.PREMIUM_SSD,
        encryption_set: str | None = None,
        infrastructure_cipher: Cipher | None = None,
        path: Path | None = None,
        pool: str | None = None,
    ) -> Disk:
        """Make an empty disk of *size* bytes.

        :param encryption_set: whose key it is under; the platform's key without.
        :param infrastructure_cipher: of the second layer, if the set is for double encryption.
        :param path: where its image lies; or
        :param pool: the libvirt storage pool, of type ``dir``, ``fs`` or ``netfs``, that it lies in.
        :raise VirtSseError: By meaning; see :meth:`Provisioning.create`.
        """
        disk = self._provisioning.create(
            name,
            size,
            self._image_path(name, image_format, path, pool),
            image_format=image_format,
            sku=sku,
            encryption_set=self._usable_set(encryption_set),
            infrastructure_cipher=infrastructure_cipher,
        )
        self._refresh_pool(pool)
        return disk

    def import_disk(
        self,
        name: str,
        source: Path,
        *,
        source_format: str | None = None,
        with_backing: bool = False,
        image_format: DiskFormat = DiskFormat.QCOW2,
        sku: DiskSku = DiskSku.PREMIUM_SSD,
        encryption_set: str | None = None,
        infrastructure_cipher: Cipher | None = None,
        path: Path | None = None,
        pool: str | None = None,
        progress: Progress = silent,
    ) -> Disk:
        """Make a disk with the content of any image that qemu-img reads.

        :raise VirtSseError: By meaning; see :meth:`Transfer.import_image`.
        """
        disk = self._transfer.import_image(
            name,
            source,
            self._image_path(name, image_format, path, pool),
            source_format=source_format,
            with_backing=with_backing,
            image_format=image_format,
            sku=sku,
            encryption_set=self._usable_set(encryption_set),
            infrastructure_cipher=infrastructure_cipher,
            progress=progress,
        )
        self._refresh_pool(pool)
        return disk

    def adopt_disk(self, path: Path, *, name: str | None = None, encryption_set: str | None = None) -> Disk:
        """Put a disk that the store does not have into it, from its image alone.

        :raise VirtSseError: By meaning; see :meth:`Provisioning.adopt`.
        """
        return self._provisioning.adopt(path, name=name, encryption_set=self._usable_set(encryption_set))

    def list_disks(self) -> list[Disk]:
        """All disks, by name."""
        return [self._provisioning.refresh(disk) for disk in self._store.all()]

    def get_disk(self, name: str) -> Disk:
        """The disk of that name or id.

        :raise DiskNotFoundError: When there is none.
        """
        return self._provisioning.refresh(self._store.get(name))

    def disks_with_ids(self, ids: Collection[UUID]) -> list[Disk]:
        """The disks of those ids that there are, as the store has them."""
        return self._store.with_ids(ids)

    def try_dek(self, disk: Disk, slot: str) -> None:
        """See whether the DEK in *slot* of a disk can be had: by unwrapping it.

        :raise KeyProviderError: By meaning, when it cannot.
        :raise AuditError: When that cannot be recorded.
        """
        self._wrapping.unwrap_slot(disk, slot)

    def key_state(self, disk: Disk) -> dict[KeyId, KeyState]:
        """The state of each KEK that the disk is under."""
        return {
            entry.wrapped.key: self._wrapping.key_state(
                entry.wrapped.key, encryption_set=disk.identity_for(entry.slot)
            )
            for entry in disk.deks
        }

    def image_state(self, disk: Disk) -> str:
        """What the disk's image is like, without opening it: ``present``, or what is wrong with it."""
        try:
            with img.opened(disk.path) as descriptor:
                if envelope_slots.read(descriptor, disk.format).disk_id != disk.id:
                    return f"{disk.path} is the image of another disk"
        except ImageError as exc:
            return str(exc)
        return "present"

    def resize_disk(self, name: str, size: int, *, shrink: bool = False) -> Disk:
        """Make a disk *size* bytes large, also while a domain has it.

        :raise VirtSseError: By meaning; see :meth:`Provisioning.resize`.
        """
        disk = self._store.get(name)
        return self._provisioning.resize(
            disk, size, shrink=shrink, live=lambda size: self.domains.resize_live(disk, size)
        )

    def export_disk(
        self, name: str, destination: Path, *, destination_format: str = "qcow2", progress: Progress = silent
    ) -> None:
        """Write a disk's content, in plaintext, into a new image.

        :raise VirtSseError: By meaning; see :meth:`Transfer.export`.
        """
        self._transfer.export(
            self._store.get(name), destination, destination_format=destination_format, progress=progress
        )

    def check_disk(self, name: str) -> None:
        """See whether a disk's image is whole, opens with its DEK and carries it.

        :raise VirtSseError: By meaning; see :meth:`Provisioning.check`.
        """
        self._provisioning.check(self._store.get(name))

    def inspect_disk(self, name: str) -> list[Finding]:
        """What the guest has encrypted on a disk, also while a domain has it.

        :raise VirtSseError: By meaning; see :meth:`Inspector.disk`.
        """
        return self.inspector.disk(self._store.get(name))

    def delete_disk(self, name: str, *, dry_run: bool = False) -> Disk:
        """Erase a disk for good.

        :param dry_run: just see whether it could be.
        :raise DiskInUseError: When a domain has it, even one that does not run.
        :raise LibvirtUnavailableError: When libvirt cannot be asked.
        :raise VirtSseError: By meaning; see :meth:`Provisioning.delete`.
        """
        disk = self._store.get(name)
        if users := self.domains.users(disk):
            raise DiskInUseError(
                f"disk {disk.name!r} is attached to domain {users[0]!r}",
                hint=f"'virt-sse disk detach {disk.name} {users[0]}' takes it out",
            )
        self._provisioning.delete(disk, dry_run=dry_run)
        return disk

    def disk_xml(self, name: str, *, target: str = "vda", read_only: bool = False) -> str:
        """The ``<disk>`` element with which a domain uses a disk.

        :raise DiskNotFoundError: When there is none.
        """
        return self.domains.element(self._store.get(name), target=target, read_only=read_only)

    def attach_disk(
        self,
        name: str,
        domain: str,
        *,
        target: str | None = None,
        read_only: bool = False,
        caching: HostCaching = HostCaching.NONE,
    ) -> str:
        """Add a disk to a domain, running or not; its target in the guest.

        :param caching: what the host is to cache of it, in a domain with encryption at host.
        :raise VirtSseError: By meaning; see :meth:`Domains.attach`.
        """
        disk = dataclasses.replace(self._store.get(name), caching=caching)
        return self.domains.attach(
            disk,
            domain,
            target=target,
            read_only=read_only,
            content=self.inspector.content(disk, domain),
            settled=lambda: self._store.vms.set_caching(disk.id, caching),
        )

    def detach_disk(self, name: str, domain: str) -> None:
        """Take a disk out of a domain, running or not.

        :raise VirtSseError: By meaning; see :meth:`Domains.detach`.
        """
        disk = self._store.get(name)
        self.domains.detach(disk, domain)
        self._store.vms.set_caching(disk.id, HostCaching.NONE)

    def move_disk(self, name: str, encryption_set: str) -> Disk:
        """Put a disk into another encryption set, also while a domain has it.

        :raise VirtSseError: By meaning; see :meth:`Rotation.move`.
        """
        target = self._store.encryption_sets.get(encryption_set)
        self._require_here(target)
        self._rotation.move(self._store.get(name), target)
        return self._store.get(name)

    # Keys

    def keys_in_use(self) -> list[KeyUse]:
        """Each KEK version that disks and VMs are under, with its state; one entry per encryption set."""
        used = Counter(self._store.keys_in_use())
        used.update({(key, None): deks for key, deks in self._store.vms.keys_in_use().items()})
        return [
            KeyUse(key, set_id, deks, self._wrapping.key_state(key, encryption_set=set_id))
            for (key, set_id), deks in used.items()
        ]

    def rotate_key(self, key: KeyRef, *, progress: Progress = silent) -> tuple[KeyId, RewrapReport]:
        """Make a new version of *key* and bring every disk and VM under it; see :meth:`Rotation.rewrap`.

        :raise KeyProviderError: When the provider refuses, or its keys are rotated elsewhere.
        """
        return self._wrapping.rotate(key), self._rewrap(key, progress)

    def rewrap(self, key: KeyRef, *, progress: Progress = silent) -> RewrapReport:
        """Bring every disk and VM under *key* to its current version, e.g. after a rotation that was cut off.

        :raise KeyProviderError: When the provider cannot name the current version.
        """
        self._wrapping.current_key(key)
        return self._rewrap(key, progress)

    def _rewrap(self, key: KeyRef, progress: Progress) -> RewrapReport:
        return self._rotation.rewrap(self._store.under_key(key), progress) + self.vms.rewrap(key)

    def _usable_set(self, name: str | None) -> EncryptionSet | None:
        """The set that a disk of this host is to be in."""
        if name is None:
            return None
        encryption_set = self._store.encryption_sets.get(name)
        self._require_here(encryption_set)
        return encryption_set

    def _require_here(self, encryption_set: EncryptionSet) -> None:
        """Refuse a set of another subscription or region than this host's disks are in."""
        there = (encryption_set.subscription, encryption_set.region)
        here = (self.config.subscription, self.config.region)
        if there != here:
            raise PolicyError(
                f"set {encryption_set.name!r} is in subscription {there[0]!r}, region {there[1]!r}; "
                f"this host's disks are in {here[0]!r}, {here[1]!r}"
            )

    def _image_path(self, name: str, image_format: DiskFormat, path: Path | None, pool: str | None) -> Path:
        if path and pool:
            raise InvalidValueError("a disk lies at a path or in a pool, not both")
        if path:
            return path
        folder = pool_folder(self.config.libvirt_uri, pool) if pool else self.config.disk_directory
        return folder / f"{check_name(name)}.{image_format.value}"

    def _refresh_pool(self, pool: str | None) -> None:
        if pool:
            refresh_pool(self.config.libvirt_uri, pool)

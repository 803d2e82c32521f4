"""The one façade that the command line, the libvirt hook and tests call."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from virt_sse import envelope
from virt_sse.audit import AuditLog
from virt_sse.config import Config
from virt_sse.disks import Disk, check_name
from virt_sse.domains import Domains
from virt_sse.errors import ConfigError, DiskInUseError, ImageError, InvalidValueError
from virt_sse.keys import KeyId, KeyRef, KeyState
from virt_sse.layers import EncryptionType
from virt_sse.libvirt import hook
from virt_sse.libvirt.pools import pool_folder, refresh_pool
from virt_sse.locks import DiskLocks
from virt_sse.plugins import PluginHost
from virt_sse.provisioning import Provisioning
from virt_sse.qemu import img
from virt_sse.qemu.img import DiskFormat
from virt_sse.rotation import RewrapReport, Rotation
from virt_sse.store import Store
from virt_sse.transfer import Progress, Transfer, silent
from virt_sse.wrapping import Wrapping

PLATFORM_KEY = KeyRef("platform-managed", "default")
"""What a disk is encrypted under unless something else is said."""


class Backend:
    """All that virt-sse does on a host. Finishes first what a killed command left half-done.

    :raise StoreError: When the store cannot be opened.
    :raise PluginError: When a required plugin is broken.
    """

    def __init__(self, config: Config, plugins: PluginHost | None = None) -> None:
        self.config = config
        self.plugins = plugins or PluginHost(config)
        self._store = Store(config.store_url)
        locks = DiskLocks(config.state_directory / "disks.lock")
        wrapping = self._wrapping = Wrapping(self.plugins, AuditLog.of_host(config))
        self._provisioning = Provisioning(self._store, self.plugins, wrapping, locks)
        self._transfer = Transfer(self.plugins, self._provisioning)
        self._rotation = Rotation(self._store, wrapping, locks)
        self.domains = Domains(config.libvirt_uri, self._store, self.plugins, wrapping)
        try:
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
        """Make what a host needs and does not have: the platform's keyring, and libvirt's hook.

        :return: what was made, in words.
        :raise KeyringError: When part of a keyring is there, or disks are under one that is not there: it is
            never made anew.
        :raise ConfigError: When the hook cannot be written.
        """
        made = []
        provider = self.plugins.key_provider(PLATFORM_KEY.provider)
        if any(key.provider == PLATFORM_KEY.provider for key in self.keys_in_use()):
            provider.current_key(PLATFORM_KEY.name)
        elif provider.provision():
            made.append(f"keyring {self.config.key_provider(PLATFORM_KEY.provider).directory}")
        environment = {"VIRT_SSE_ROOT": str(self.config.root), "LIBVIRT_DEFAULT_URI": self.config.libvirt_uri}
        try:
            if hook.install(self.config.hook_path, environment):
                made.append(f"libvirt hook {self.config.hook_path}")
        except OSError as exc:
            raise ConfigError(f"cannot write {self.config.hook_path}: {exc.strerror}") from exc
        return made

    # Disks

    def create_disk(
        self,
        name: str,
        size: int,
        *,
        image_format: DiskFormat = DiskFormat.QCOW2,
        path: Path | None = None,
        pool: str | None = None,
    ) -> Disk:
        """Make an empty disk of *size* bytes, under the platform's key.

        :param path: where its image lies; or
        :param pool: the libvirt storage pool, of type ``dir``, ``fs`` or ``netfs``, that it lies in.
        :raise VirtSseError: By meaning; see :meth:`Provisioning.create`.
        """
        disk = self._provisioning.create(
            name,
            size,
            self._image_path(name, image_format, path, pool),
            image_format=image_format,
            key=PLATFORM_KEY,
            encryption_type=EncryptionType.PLATFORM_KEY,
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
            key=PLATFORM_KEY,
            encryption_type=EncryptionType.PLATFORM_KEY,
            progress=progress,
        )
        self._refresh_pool(pool)
        return disk

    def adopt_disk(self, path: Path, *, name: str | None = None) -> Disk:
        """Put a disk that the store does not have into it, from its image alone.

        :raise VirtSseError: By meaning; see :meth:`Provisioning.adopt`.
        """
        return self._provisioning.adopt(path, name=name)

    def list_disks(self) -> list[Disk]:
        """All disks, by name."""
        return [self._provisioning.refresh(disk) for disk in self._store.all()]

    def get_disk(self, name: str) -> Disk:
        """The disk of that name or id.

        :raise DiskNotFoundError: When there is none.
        """
        return self._provisioning.refresh(self._store.get(name))

    def key_state(self, disk: Disk) -> dict[KeyId, KeyState]:
        """The state of each KEK that the disk is under."""
        return {
            entry.wrapped.key: self.plugins.key_provider(entry.wrapped.key.provider).key_state(
                entry.wrapped.key
            )
            for entry in disk.deks
        }

    def image_state(self, disk: Disk) -> str:
        """What the disk's image is like, without opening it: ``present``, or what is wrong with it."""
        try:
            with img.opened(disk.path) as descriptor:
                if envelope.read(descriptor, disk.format).disk_id != disk.id:
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
        self, name: str, domain: str, *, target: str | None = None, read_only: bool = False
    ) -> str:
        """Add a disk to a domain, running or not; its target in the guest.

        :raise VirtSseError: By meaning; see :meth:`Domains.attach`.
        """
        return self.domains.attach(self._store.get(name), domain, target=target, read_only=read_only)

    def detach_disk(self, name: str, domain: str) -> None:
        """Take a disk out of a domain, running or not.

        :raise VirtSseError: By meaning; see :meth:`Domains.detach`.
        """
        self.domains.detach(self._store.get(name), domain)

    # Keys

    def keys_in_use(self) -> dict[KeyId, int]:
        """Each KEK version that disks are under, and how many."""
        return self._store.keys_in_use()

    def rotate_key(self, key: KeyRef, *, progress: Progress = silent) -> tuple[KeyId, RewrapReport]:
        """Make a new version of *key* and bring every disk under it; see :meth:`Rotation.rewrap`.

        :raise KeyProviderError: When the provider refuses, or its keys are rotated elsewhere.
        """
        version = self._wrapping.rotate(key)
        return version, self._rotation.rewrap(key, progress)

    def rewrap(self, key: KeyRef, *, progress: Progress = silent) -> RewrapReport:
        """Bring every disk under *key* to its current version, e.g. after a rotation that was cut off.

        :raise KeyProviderError: When the provider cannot name the current version.
        """
        return self._rotation.rewrap(key, progress)

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

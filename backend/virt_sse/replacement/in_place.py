"""Encryption in place: an encrypted disk in the place of each plaintext disk of a domain."""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path

from virt_sse.disks.creation import Successor
from virt_sse.disks.inspector import Inspector
from virt_sse.disks.lifecycle import Disks
from virt_sse.domains.start import DomainStart
from virt_sse.errors import DiskInUseError, ImageError
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk, check_path
from virt_sse.model.operations import AttachDisk
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.qemu import image_file
from virt_sse.qemu.backing_chain import opened_chain
from virt_sse.replacement.offline import Bars, copy_offline
from virt_sse.replacement.online import OnlineCopy
from virt_sse.replacement.plain_disks import PlainDisk, plain_disks, user_of_image
from virt_sse.replacement.settlement import Settlement, await_unlocked
from virt_sse.system.overwrite import overwrite_and_remove


@dataclass(frozen=True, slots=True, kw_only=True)
class EncryptionInPlace:
    """How to encrypt the plaintext disks of a domain.

    :ivar encryption_set: name or id; ``None``: under the platform's key.
    :ivar directory: folder of the new images; default: that of the plaintext image, or of a block device the
        configured folder.
    :ivar max_rate: upper bound in bytes/s.
    """

    cipher: Cipher = AES_256_XTS
    infrastructure_cipher: Cipher | None = None
    encryption_set: str | None = None
    format: DiskFormat = DiskFormat.QCOW2
    directory: Path | None = None
    max_rate: int | None = None


@dataclass(frozen=True, slots=True)
class EncryptedInPlace:
    """A disk of a domain after its encryption in place.

    :ivar target: the disk's name in the guest.
    :ivar plaintext: the plaintext image, which is still there.
    """

    target: str
    disk: Disk
    plaintext: Path
    paused_seconds: float | None


@dataclass(frozen=True, slots=True)
class WipedImage:
    """A plaintext image that was overwritten and removed.

    :ivar in_place: whether the file system is known to overwrite in place.
    """

    path: Path
    in_place: bool


class InPlace:
    """Encrypts plaintext disks of domains, and wipes the plaintext images."""

    def __init__(
        self, host: Host, disks: Disks, start: DomainStart, inspector: Inspector, settlement: Settlement
    ) -> None:
        self._host = host
        self._uri = host.config.libvirt_uri
        self._store = host.store
        self._plugins = host.plugins
        self._locks = host.locks
        self._disks = disks
        self._start = start
        self._inspector = inspector
        self._settlement = settlement

    def plain_disks(self, domain_name: str) -> list[PlainDisk]:
        """The plaintext disks of a domain, as :meth:`encrypt` takes them.

        :raise VmStateError: When a disk is not a file or a block device of this host.
        :raise LibvirtError: When no such domain exists.
        """
        with connected(self._uri) as connection:
            return plain_disks(connection, domains.lookup(connection, domain_name))

    def encrypt(
        self, domain_name: str, plain: PlainDisk, change: EncryptionInPlace, bars: Bars
    ) -> EncryptedInPlace:
        """Put an encrypted disk in the place of a plaintext disk of a domain, running or not.

        The plaintext image stays, until :meth:`wipe`.

        :raise DiskExistsError: When the name or the path of the new disk is taken.
        :raise DiskInUseError: When a process outside libvirt uses the image.
        :raise ImageFormatError: When the image or its backing chain is refused.
        :raise VirtSseError: By meaning; the domain is then as before.
        """
        copy_id = uuid.uuid4()
        stem = re.sub(r"[^A-Za-z0-9._-]", "-", domain_name[:60]).lstrip("-._") or "vm"
        name = f"{stem}-{plain.target}"
        folder = change.directory or (
            plain.path.parent if plain.is_file else self._host.config.disk_directory
        )
        with image_file.held(plain.path) as descriptor:
            status = os.fstat(descriptor)
        copy = Replacement(
            disk_id=copy_id,
            name=name,
            source_path=plain.path,
            source_identity=(status.st_dev, status.st_ino),
            domain_id=plain.domain_id,
            target=plain.target,
            max_rate=change.max_rate,
        )
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._locks.hold(copy.lock_id))
            chain = None
            if not plain.is_running:
                chain = stack.enter_context(opened_chain(plain.path, plain.format))
            size = chain.size if chain else plain.size
            new = NewDisk(
                name=name,
                size=size,
                format=change.format,
                encryption_set=change.encryption_set,
                cipher=change.cipher,
                infrastructure_cipher=change.infrastructure_cipher,
                place=check_path(folder / f"{name}.{change.format.value}"),
            )
            self._store.replacements.begin(copy)
            paused = None
            with self._settlement.undone_after_failure(copy):
                content = self._inspector.plain_content(plain.path, plain.format)
                disk = self._disks.create(
                    new, content=content, successor=Successor(copy_id, name, plain.serial)
                )
                self._store.replacements.reserve(copy)
                self._plugins.validate(AttachDisk(disk, domain_name, plain.encryption_at_host, content))
                if chain is None:
                    with bars(f"encrypting {plain.target}") as progress:
                        paused = OnlineCopy(self._host, self._start, copy).run(progress)
                else:
                    before = chain.identity()
                    copy_offline(self._host, copy, chain.source, bars, None)
                    if chain.identity() != before:
                        raise ImageError(f"{plain.path} or a backing file was changed during the copy")
                    self._store.replacements.take_over(copy)
            self._settlement.finish_or_leave(copy)
        return EncryptedInPlace(plain.target, self._store.get(str(copy_id)), plain.path, paused)

    def kept_images(self, domain_name: str) -> list[Path]:
        """The plaintext images kept after the encryption of a domain's disks.

        :raise LibvirtError: When no such domain exists.
        """
        return [copy.source_path for copy in self._kept(domain_name) if copy.source_path]

    def wipe(self, domain_name: str) -> list[WipedImage]:
        """Overwrite and remove the plaintext images kept after the encryption of a domain's disks.

        :raise DiskInUseError: When a domain or a process uses an image.
        :raise ImageError: When an image is a block device or another file than before, or cannot be
            overwritten.
        """
        wiped = []
        for copy in self._kept(domain_name):
            path = copy.source_path
            if path is None or copy.source_identity is None:
                continue
            if path.is_block_device():
                raise ImageError(
                    f"{path} is a block device", hint="erase the device with the tools of its storage"
                )
            with connected(self._uri) as connection:
                if user := user_of_image(connection, path):
                    raise DiskInUseError(f"{path} is in use by domain {user!r}")
            if os.path.lexists(path):
                await_unlocked(path)
            in_place = overwrite_and_remove(path, copy.source_identity)
            self._store.replacements.remove(copy)
            wiped.append(WipedImage(path, in_place))
        return wiped

    def _kept(self, domain_name: str) -> list[Replacement]:
        with connected(self._uri) as connection:
            domain_id = uuid.UUID(domains.lookup(connection, domain_name).UUIDString())
        found = self._store.replacements.of_domain(domain_id)
        return [copy for copy in found if copy.state is ReplacementState.KEPT]

"""Domains about to migrate to this host, which still run on another host (libvirt ``hooks.html``).

libvirt runs the hook at the destination alone: for ``migrate`` and ``prepare`` before its QEMU starts, for
``started`` when this QEMU waits for the guest's state. A failed hook ends the migration before any state is
sent, and ``virsh`` prints the reason at the source.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from uuid import UUID, uuid4

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, ImageError, PolicyError, VmStateError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.libvirt.migration_flags import MigrationFlags
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.layers import HostCache, LayerPlan, StorageNode
from virt_sse.qemu import image_file
from virt_sse.stages import Stages
from virt_sse.stages.hand_overs import HandOvers
from virt_sse.system.files import private_folder, write_private
from virt_sse.system.rbd_names import is_rbd
from virt_sse.system.running_process import qemu_process

_CLAIMED = " claimed"
_VALID_SECONDS = 60.0
"""libvirt prepares a live migration at once. After an offline migration, the definition keeps the token."""


@dataclass(frozen=True, slots=True)
class IncomingDomain:
    """The note about a migration to this host.

    :ivar token: see :mod:`~virt_sse.libvirt.migration_token`.
    :ivar is_claimed: whether libvirt has prepared the migration.
    :ivar received: disks of this host that get the content of the source's disks.
    """

    token: UUID
    is_claimed: bool
    received: frozenset[UUID]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse the content of a note.

        :raise ValueError: When *text* is malformed.
        """
        first, *others = text.splitlines() or [""]
        return cls(UUID(first.removesuffix(_CLAIMED)), first.endswith(_CLAIMED), frozenset(map(UUID, others)))

    def __str__(self) -> str:
        first = f"{self.token}{_CLAIMED if self.is_claimed else ''}"
        return "\n".join((first, *map(str, sorted(self.received))))


class IncomingDomains:
    """The migrations to this host, each a file with a token until the domain ends here."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def announce(self, definition: DomainDefinition, received: Collection[UUID] = ()) -> str:
        """Begin a migration to this host: the definition for libvirt, with a new token.

        :param received: disks of this host, named in the definition, that get the content of the source's.
        :raise VmStateError: When the token cannot be written.
        """
        token, edit = uuid4(), DomainEdit(definition)
        edit.set_migration_token(token)
        self._write(definition.uuid, IncomingDomain(token, False, frozenset(received)))
        return edit.result().to_xml()

    def claim(self, definition: DomainDefinition) -> bool:
        """Whether libvirt prepares the migration that :meth:`announce` began; once, within a minute.

        :raise VmStateError: When the claim cannot be written.
        """
        note = self.find(definition.uuid)
        if note is None or note.is_claimed or note.token != definition.migration_token:
            return False
        if time.time() - self._path(definition.uuid).stat().st_mtime > _VALID_SECONDS:
            return False
        self._write(definition.uuid, replace(note, is_claimed=True))
        return True

    def check_started(self, definition: DomainDefinition) -> None:
        """Check how QEMU, which waits for the guest's state, has the images open meanwhile.

        A storage daemon holds QEMU's requests from now on, until the source has closed the image.

        QEMU opens images for writing when the guest comes, after the source's QEMU has closed them, or before
        for ``virsh migrate --copy-storage-all``. Images of the source's disks must not be open for writing:
        source and destination would both write. Images that get the content of the source's disks must be:
        otherwise the guest would go on with an empty disk.

        :raise DiskInUseError: When QEMU has an image of the source open for writing.
        :raise PolicyError: When contents are not copied to the disks prepared for them, or without TLS.
        :raise StageError: When a storage daemon does not hold requests.
        :raise VmStateError: When the process, an image or the flags of the migration cannot be seen.
        """
        note = self.find(definition.uuid)
        if note is None or not note.is_claimed or note.token != definition.migration_token:
            return  # restored from a saved state, or not migrated at all
        qemu = qemu_process(self._config.qemu_pid_file(definition.name), definition.uuid)
        if qemu is None:
            raise VmStateError(f"cannot see the QEMU process of domain {definition.name!r}")
        if note.received:
            self._check_flags(definition)
        for use in definition.our_disks:
            is_received = use.disk_id in note.received
            try:
                if use.source and is_rbd(use.source):
                    is_open = self._flags(definition).copies_any  # how QEMU has the image open cannot be seen
                elif use.source is None or (is_received and stat.S_ISSOCK(use.source.stat().st_mode)):
                    continue  # a storage process has the image open
                else:
                    is_open = has_open_for_writing(qemu, use.source)
            except OSError as exc:
                raise VmStateError(f"cannot see how QEMU uses the image of {use.target}: {exc}") from exc
            if is_open and not is_received:
                raise DiskInUseError(
                    f"QEMU writes to the image of {use.target} while the domain runs on another host",
                    hint="migrate without --copy-storage-all: the hosts must share the image",
                )
            if is_received and not is_open:
                raise PolicyError(
                    f"{use.target} has a disk on this host to which the migration copies nothing",
                    hint=f"migrate with --copy-storage-all; with --migrate-disks, name {use.target} as well",
                )
        HandOvers(Stages(self._config)).expect_guest(definition.uuid, but=note.received)

    def _check_flags(self, definition: DomainDefinition) -> None:
        """Check that the migration copies the whole content of disks, and encrypts what it sends.

        :raise PolicyError: Otherwise.
        :raise VmStateError: When libvirt's flags of the migration cannot be read.
        """
        flags = self._flags(definition)
        if not flags.copies_disks or flags.copies_changes_alone:
            raise PolicyError(
                f"disks of domain {definition.name!r} are on the storage of this host, "
                "and the migration does not copy them",
                hint="migrate with --copy-storage-all",
            )
        if not flags.has_tls and not self._config.copies_without_tls:
            raise PolicyError(
                "the contents of encrypted disks would cross the network in plaintext",
                hint="migrate with --tls; on a trusted link, set 'copies-without-tls' in [libvirt]",
            )

    def _flags(self, definition: DomainDefinition) -> MigrationFlags:
        return MigrationFlags.of(self._config.domain_status_file(definition.name))

    def find(self, domain_id: UUID) -> IncomingDomain | None:
        """The note about a domain that came, or is about to come, by a migration.

        :raise VmStateError: When the note cannot be read.
        """
        path = self._path(domain_id)
        try:
            return IncomingDomain.parse(path.read_text("ascii"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as exc:
            raise VmStateError(f"cannot read {path}: {exc}") from exc

    def forget(self, domain_id: UUID) -> IncomingDomain | None:
        """Forget a domain that has ended here: the note, if the domain had come by a migration."""
        note = None
        with contextlib.suppress(VmStateError):
            note = self.find(domain_id)
        self._path(domain_id).unlink(missing_ok=True)
        return note

    def note_received(self, domain_id: UUID) -> None:
        """Note that the disks of a domain that runs here now have their contents.

        :raise VmStateError: When the note cannot be written.
        """
        if note := self.find(domain_id):
            self._write(domain_id, replace(note, received=frozenset()))

    def _path(self, domain_id: UUID) -> Path:
        return self._config.incoming_directory / str(domain_id)

    def _write(self, domain_id: UUID, note: IncomingDomain) -> None:
        path = self._path(domain_id)
        try:
            private_folder(path.parent)
            write_private(path, str(note).encode())
        except OSError as exc:
            raise VmStateError(f"cannot write {path}: {exc.strerror}") from exc


def refuse_data_on_host(definition: DomainDefinition) -> None:
    """Refuse the migration of a domain with data under keys of its VM, which stay on a host.

    :raise PolicyError: When the domain has a temporary disk or a TPM with a DEK of ours.
    """
    for is_there, what in (
        (bool(definition.temp_disks), "a temporary disk"),
        (definition.has_our_tpm_secret, "a TPM whose state is encrypted by virt-sse"),
    ):
        if is_there:
            raise PolicyError(
                f"domain {definition.name!r} has {what}, which does not migrate",
                hint="stop the domain, define it on the other host, and start it there",
            )


def refuse_disk(disk: Disk, plan: LayerPlan) -> None:
    """Refuse the migration of a disk with a host cache, or of which this host has a copy.

    The lock of the source's QEMU tells the image in use from a copy, and that locks hold between the hosts.

    A disk in state ``receiving`` is a disk of this host alone.

    :raise PolicyError: When the disk has a host cache: data in the source's cache is not in the image. When
        the disk has a storage daemon and is in Ceph, where no lock decides which daemon has the image.
    :raise ImageError: When no QEMU process has the image open.
    """
    if disk.state is DiskState.RECEIVING:
        return
    if any(isinstance(stage, HostCache) for stage in plan.stages):
        raise PolicyError(
            f"disk {disk.name!r} has a host cache, which does not migrate with a domain",
            hint="stop the domain, define it on the other host, and start it there; "
            f"or 'virt-sse disk receive {disk.name}', then migrate with --copy-storage-all",
        )
    if is_rbd(disk.path) and any(isinstance(stage, StorageNode) for stage in plan.stages):
        raise PolicyError(
            f"disk {disk.name!r} is in Ceph and has a storage daemon, and does not migrate with a domain",
            hint="stop the domain, define it on the other host, and start it there",
        )
    if not image_file.is_open(disk.path):
        raise ImageError(
            f"{disk.path} is not the image in use on the source: no QEMU process has a lock on it",
            hint="the hosts must share the folder, with locks, e.g. by NFS 4; "
            f"if they do not, 'virt-sse disk receive {disk.name}', then migrate with --copy-storage-all; "
            "after an offline migration, start the domain again",
        )


def has_open_for_writing(pid: int, path: Path) -> bool:
    """Whether a process has a file open for writing.

    :raise OSError: When the process or the file is gone.
    """
    wanted = path.stat()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found = entry.stat()
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                flags = Path(f"/proc/{pid}/fdinfo/{entry.name}").read_text().split("flags:")[1].split()[0]
                if int(flags, 8) & os.O_ACCMODE != os.O_RDONLY:
                    return True
    return False

"""Domains about to migrate to this host, which still run on another host (libvirt ``hooks.html``).

libvirt runs the hook at the destination alone: for ``migrate`` and ``prepare`` before its QEMU starts, for
``started`` when this QEMU waits for the guest's state. A failed hook ends the migration before any state is
sent, and ``virsh`` prints the reason at the source.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from uuid import UUID, uuid4

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, ImageError, PolicyError, VmStateError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.model.disks import Disk
from virt_sse.model.layers import HostCache, LayerPlan, StorageNode
from virt_sse.qemu import image_file
from virt_sse.stages import Stages
from virt_sse.stages.hand_overs import HandOvers
from virt_sse.system.files import private_folder, write_private
from virt_sse.system.listening_sockets import listening_sockets
from virt_sse.system.rbd_names import is_rbd
from virt_sse.system.running_process import qemu_process

_LIBVIRT_SOCKETS = ("/var/lib/libvirt/qemu/", "/run/libvirt/qemu/")
_CLAIMED = b" claimed"
_VALID_SECONDS = 60.0
"""libvirt prepares a live migration at once. After an offline migration, the definition keeps the token."""


class IncomingDomains:
    """The migrations to this host, each a file with a token until the domain ends here."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def announce(self, definition: DomainDefinition) -> str:
        """Begin a migration to this host: the definition for libvirt, with a new token.

        :raise VmStateError: When the token cannot be written.
        """
        token, edit = uuid4(), DomainEdit(definition)
        edit.set_migration_token(token)
        self._write(definition.uuid, str(token).encode())
        return edit.result().to_xml()

    def claim(self, definition: DomainDefinition) -> bool:
        """Whether libvirt prepares the migration that :meth:`announce` began; once, within a minute.

        :raise VmStateError: When the claim cannot be written.
        """
        token = str(definition.migration_token).encode()
        if self._read(definition.uuid) != token:
            return False
        if time.time() - self._path(definition.uuid).stat().st_mtime > _VALID_SECONDS:
            return False
        self._write(definition.uuid, token + _CLAIMED)
        return True

    def check_started(self, definition: DomainDefinition) -> None:
        """Check that QEMU, which waits for the guest's state, cannot write to the images meanwhile.

        A storage daemon holds QEMU's requests from now on, until the source has closed the image.

        QEMU opens images for writing when the guest comes, after the source's QEMU has closed them, or before
        for ``virsh migrate --copy-storage-all``: then source and destination would both write.

        :raise DiskInUseError: When QEMU has an image open for writing.
        :raise StageError: When a storage daemon does not hold requests.
        :raise VmStateError: When the process or an image cannot be seen.
        """
        token = str(definition.migration_token).encode()
        if self._read(definition.uuid) != token + _CLAIMED:
            return  # restored from a saved state, or not migrated at all
        qemu = qemu_process(self._config.qemu_pid_file(definition.name), definition.uuid)
        if qemu is None:
            raise VmStateError(f"cannot see the QEMU process of domain {definition.name!r}")
        for use in definition.our_disks:
            try:
                if use.source and is_rbd(use.source):
                    is_open = _receives_content(qemu, definition)
                else:
                    is_open = use.source is not None and has_open_for_writing(qemu, use.source)
            except OSError as exc:
                raise VmStateError(f"cannot see how QEMU uses the image of {use.target}: {exc}") from exc
            if is_open:
                raise DiskInUseError(
                    f"QEMU writes to the image of {use.target} while the domain runs on another host",
                    hint="migrate without --copy-storage-all: the hosts must share the image",
                )
        HandOvers(Stages(self._config)).expect_guest(definition.uuid)

    def forget(self, domain_id: UUID) -> bool:
        """Forget a domain that has ended here; whether the domain had come by a migration."""
        try:
            self._path(domain_id).unlink()
        except FileNotFoundError:
            return False
        return True

    def _path(self, domain_id: UUID) -> Path:
        return self._config.incoming_directory / str(domain_id)

    def _read(self, domain_id: UUID) -> bytes:
        try:
            return self._path(domain_id).read_bytes()
        except FileNotFoundError:
            return b""

    def _write(self, domain_id: UUID, content: bytes) -> None:
        path = self._path(domain_id)
        try:
            private_folder(path.parent)
            write_private(path, content)
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

    :raise PolicyError: When the disk has a host cache: data in the source's cache is not in the image. When
        the disk has a storage daemon and is in Ceph, where no lock decides which daemon has the image.
    :raise ImageError: When no QEMU process has the image open.
    """
    if any(isinstance(stage, HostCache) for stage in plan.stages):
        raise PolicyError(
            f"disk {disk.name!r} has a host cache, which does not migrate with a domain",
            hint="stop the domain, define it on the other host, and start it there",
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
            "after an offline migration, start the domain again",
        )


def _receives_content(pid: int, definition: DomainDefinition) -> bool:
    """Whether a QEMU process that waits for a guest may get the content of disks as well, by an NBD server.

    How QEMU has an RBD image open cannot be seen. QEMU listens for the guest, for an NBD server, where the
    definition says, and in libvirt's folders.

    :raise OSError: When the process is gone.
    """
    known = definition.socket_names
    others = [
        name for name in listening_sockets(pid) if name not in known and not name.startswith(_LIBVIRT_SOCKETS)
    ]
    return len(others) > 1


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

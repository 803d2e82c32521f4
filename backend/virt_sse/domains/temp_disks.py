"""VMs' temporary disks: raw LUKS images, made at a domain's start and erased after the domain's end.

The DEK is wrapped by the platform key, and stored only in the image's envelope. libvirt has the DEK while the
domain runs; after a loss by libvirt, the DEK is unwrapped from the envelope again. Temporary disks are not in
the store, because no temporary disk outlives a run of the domain.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, ImageError, VirtSseError
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.events import audit_context
from virt_sse.model.keys import Dek, DekContext
from virt_sse.model.layers import EncryptionType, HostLayer
from virt_sse.model.vms import temp_disk_id
from virt_sse.qemu import envelope_slots, image_file
from virt_sse.qemu.formatting import Volume, make
from virt_sse.system.files import private_folder, shared_folder, write_private

if TYPE_CHECKING:
    from virt_sse.keys.access import KeyAccess  # at a domain's end, the hook does without

_log = logging.getLogger(__name__)

SETTLED_SECONDS = 60.0
"""Minimum age of a temporary disk to count as unused: the disk is made shortly before the domain runs."""

_IMAGE, _BOOT = "disk.raw", "boot"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def image(config: Config, vm_id: UUID) -> Path:
    """Path of the image of a VM's temporary disk. The image exists while the VM runs."""
    return config.temp_disk_directory / str(vm_id) / _IMAGE


def exists(config: Config, vm_id: UUID) -> bool:
    """Whether a VM has a temporary disk, or remains of a temporary disk."""
    return os.path.lexists(image(config, vm_id).parent)


def create(
    config: Config, layer: HostLayer, keys: KeyAccess, vm_id: UUID, domain: str, size: int, qemu: User
) -> Dek:
    """Make a VM's temporary disk of *size* usable bytes, after erasing any earlier temporary disk.

    :param qemu: user and group of the domain's QEMU; only QEMU and root can access the image.
    :return: the DEK of the image.
    :raise DiskInUseError: When a QEMU process has the earlier temporary disk open.
    :raise ImageError: When the image cannot be made.
    :raise KeyProviderError: When the DEK cannot be wrapped.
    """
    (spec,) = layer.temporary_disk().deks
    disk_id, dek = temp_disk_id(vm_id), Dek.generate()
    with audit_context(domain=domain):
        key = keys.current_key(spec.key)
        wrapped = keys.wrap(dek, key, context=DekContext(disk_id, spec.slot))
    path = image(config, vm_id)
    try:
        erase(config, vm_id)
        shared_folder(path.parent.parent, 0o711)
        path.parent.parent.chmod(0o711)
        private_folder(path.parent)
        write_private(path.with_name(_BOOT), _BOOT_ID.read_bytes())
        make(path, DiskFormat.RAW, size, [Volume(spec.cipher, dek)])
        carried = Envelope(
            disk_id=disk_id,
            name="temporary",
            encryption_type=EncryptionType.PLATFORM_KEY,
            set_id=None,
            created=datetime.now(UTC).replace(microsecond=0),
            generation=1,
            deks=(DekEntry(spec.slot, spec.cipher, wrapped),),
        )
        with image_file.opened(path, os.O_RDWR) as descriptor:
            envelope_slots.write(descriptor, DiskFormat.RAW, carried)
        # The folder does not belong to QEMU's user: a QEMU taken over by the guest could replace the image
        # with a link, and root would erase the link's target.
        os.chown(path.parent, 0, qemu.gid)
        path.parent.chmod(0o710)
    except OSError as exc:
        raise ImageError(f"cannot make the temporary disk {path}: {exc.strerror}") from exc
    return dek


def unlock(config: Config, keys: KeyAccess, vm_id: UUID, domain: str) -> Dek:
    """Unwrap the DEK of a running VM's temporary disk.

    :raise ImageError: When the image is missing, or belongs to a different VM.
    :raise KeyProviderError: When the DEK cannot be unwrapped.
    """
    path, disk_id = image(config, vm_id), temp_disk_id(vm_id)
    with image_file.opened(path) as descriptor:
        carried = envelope_slots.read(descriptor, DiskFormat.RAW)
    if carried.disk_id != disk_id or not carried.deks:
        raise ImageError(f"{path} is not the temporary disk of domain {domain!r}")
    entry = carried.deks[0]
    with audit_context(domain=domain):
        return keys.unwrap(entry.wrapped, context=DekContext(disk_id, entry.slot))


def erase(config: Config, vm_id: UUID) -> None:
    """Crypto-erase and remove a VM's temporary disk. Does nothing without a temporary disk.

    :raise DiskInUseError: When a QEMU process has the image open.
    :raise ImageError: When the image cannot be erased or removed.
    """
    path = image(config, vm_id)
    try:
        if os.path.lexists(path):
            image_file.refuse_if_open(path)
            image_file.erase(path, DiskFormat.RAW)
            path.unlink()
        if path.parent.is_dir():
            for left in path.parent.iterdir():
                left.unlink()
            path.parent.rmdir()
    except OSError as exc:
        raise ImageError(f"cannot remove the temporary disk {path}: {exc.strerror}") from exc


def erase_of_other_boots(config: Config) -> None:
    """Erase temporary disks left by a crash of the host.

    No check for running domains is needed: no domain survives a restart of the host. A failure is logged, and
    stops no other temporary disk's erasure.
    """
    present = _BOOT_ID.read_bytes()
    for vm_id in _all(config):
        with _failure_logged():
            if image(config, vm_id).with_name(_BOOT).read_bytes() != present:
                erase(config, vm_id)


def erase_unused(config: Config, running: Collection[UUID], *, before: float) -> None:
    """Erase the temporary disks of domains not running.

    :param running: the domains running at some moment after *before*.
    :param before: in seconds of ``time.time()``. Disks made later are kept: the domain may be starting.
    """
    for vm_id in _all(config):
        with _failure_logged():
            if vm_id not in running and image(config, vm_id).parent.stat().st_mtime < before:
                erase(config, vm_id)


@contextlib.contextmanager
def _failure_logged() -> Iterator[None]:
    try:
        yield
    except (DiskInUseError, FileNotFoundError):
        return
    except (VirtSseError, OSError) as exc:
        _log.warning("cannot erase an unused temporary disk: %s", exc)
    except Exception:  # noqa: BLE001 -- one temporary disk must not stop every command of the host
        _log.exception("cannot erase an unused temporary disk")


def _all(config: Config) -> list[UUID]:
    """List the VMs with a temporary disk, or with remains of a temporary disk."""
    found = []
    try:
        names = sorted(os.listdir(config.temp_disk_directory))  # noqa: PTH208 -- names are wanted
    except OSError:
        return []
    for name in names:
        with contextlib.suppress(ValueError):
            found.append(UUID(name))
    return found

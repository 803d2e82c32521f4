"""VMs' temporary disks: raw LUKS images that are made when a domain starts and erased when it has ended.

Their DEK is under the platform's key, in the image's envelope and nowhere else: libvirt has it while the
domain runs, and from the envelope is given it again when it has lost it. They are in no store: none outlives
its run.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, ImageError, VirtSseError
from virt_sse.keys.access import KeyAccess
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.envelope import DekEntry, Envelope
from virt_sse.model.events import audit_context
from virt_sse.model.keys import Dek, DekContext
from virt_sse.model.layers import EncryptionType, HostLayer
from virt_sse.model.vms import temp_disk_id
from virt_sse.qemu import envelope_slots, img
from virt_sse.qemu.formatting import Volume, make
from virt_sse.system.files import private_folder, write_private

_log = logging.getLogger(__name__)

SETTLED_SECONDS = 60.0
"""How old a temporary disk is at least that may be of no use: one is made a little before its domain runs."""

_IMAGE, _BOOT = "disk.raw", "boot"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def image(config: Config, vm_id: UUID) -> Path:
    """Where the image of a VM's temporary disk lies while the VM runs."""
    return config.temp_disk_directory / str(vm_id) / _IMAGE


def create(
    config: Config, layer: HostLayer, keys: KeyAccess, vm_id: UUID, domain: str, size: int, qemu: User
) -> Dek:
    """Make a VM's temporary disk, of *size* usable bytes; what is left of an earlier one is erased.

    :param qemu: whom the domain's QEMU runs as; nobody else but root comes near the image.
    :return: the DEK that opens it.
    :raise DiskInUseError: When a QEMU process has the earlier one open.
    :raise ImageError: When it cannot be made.
    :raise KeyProviderError: When its DEK cannot be wrapped.
    """
    (spec,) = layer.temporary_disk().deks
    disk_id, dek = temp_disk_id(vm_id), Dek.generate()
    with audit_context(domain=domain):
        key = keys.current_key(spec.key)
        wrapped = keys.wrap(dek, key, context=DekContext(disk_id, spec.slot))
    path = image(config, vm_id)
    try:
        erase(config, vm_id)
        path.parent.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
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
        with img.opened(path, os.O_RDWR) as descriptor:
            envelope_slots.write(descriptor, DiskFormat.RAW, carried)
        # Not QEMU's own: one that a guest has taken over could put a link where root is about to erase.
        os.chown(path.parent, 0, qemu.gid)
        path.parent.chmod(0o710)
    except OSError as exc:
        raise ImageError(f"cannot make the temporary disk {path}: {exc.strerror}") from exc
    return dek


def unlock(config: Config, keys: KeyAccess, vm_id: UUID, domain: str) -> Dek:
    """The DEK of the temporary disk of a VM that runs.

    :raise ImageError: When there is none, or what lies there is another's.
    :raise KeyProviderError: When it cannot be unwrapped.
    """
    path, disk_id = image(config, vm_id), temp_disk_id(vm_id)
    with img.opened(path) as descriptor:
        carried = envelope_slots.read(descriptor, DiskFormat.RAW)
    if carried.disk_id != disk_id or not carried.deks:
        raise ImageError(f"{path} is not the temporary disk of domain {domain!r}")
    entry = carried.deks[0]
    with audit_context(domain=domain):
        return keys.unwrap(entry.wrapped, context=DekContext(disk_id, entry.slot))


def erase(config: Config, vm_id: UUID) -> None:
    """Crypto-erase a VM's temporary disk and remove it. Nothing when there is none.

    :raise DiskInUseError: When a QEMU process has it open.
    :raise ImageError: When it cannot be erased or removed.
    """
    path = image(config, vm_id)
    try:
        if os.path.lexists(path):
            img.refuse_if_open(path)
            img.erase(path, DiskFormat.RAW)
            path.unlink()
        if path.parent.is_dir():
            for left in path.parent.iterdir():
                left.unlink()
            path.parent.rmdir()
    except OSError as exc:
        raise ImageError(f"cannot remove the temporary disk {path}: {exc.strerror}") from exc


def erase_of_other_boots(config: Config) -> None:
    """Erase what a host that was killed has left. Asks nobody: no domain outlives its host."""
    present = _BOOT_ID.read_bytes()
    for vm_id in _all(config):
        boot = image(config, vm_id).with_name(_BOOT)
        with contextlib.suppress(FileNotFoundError):
            if boot.read_bytes() != present:
                _try_erase(config, vm_id)


def erase_unused(config: Config, running: Collection[UUID], *, before: float) -> None:
    """Erase the temporary disks of domains that do not run.

    :param running: those that did at a moment after *before*, in ``time.time()``: what was made later may be
        that of a domain that was just being started.
    """
    for vm_id in _all(config):
        with contextlib.suppress(FileNotFoundError):
            if vm_id not in running and image(config, vm_id).parent.stat().st_mtime < before:
                _try_erase(config, vm_id)


def _try_erase(config: Config, vm_id: UUID) -> None:
    try:
        erase(config, vm_id)
    except DiskInUseError:
        return
    except VirtSseError as exc:
        _log.warning("a temporary disk stays: %s", exc)


def _all(config: Config) -> list[UUID]:
    """The VMs of which there is a temporary disk, or something left of one."""
    found = []
    try:
        names = sorted(os.listdir(config.temp_disk_directory))  # noqa: PTH208 -- names are wanted
    except OSError:
        return []
    for name in names:
        with contextlib.suppress(ValueError):
            found.append(UUID(name))
    return found

"""In-guest encryption excludes customer-managed keys and encryption at host.

Disks are inspected only by operations that introduce one of the two, because an inspection uses the disk's
key.
"""

from __future__ import annotations

from virt_sse.api import (
    AttachDisk,
    Content,
    CreateDisk,
    EncryptionType,
    MoveDisk,
    Operation,
    PolicyError,
    UpdateVm,
    described,
)

_PLATFORM_KEY = EncryptionType.PLATFORM_KEY
_THERE = "decrypt the disk in the guest first; 'virt-sse disk inspect' shows the encrypted parts"
_COMING_IN = "to import the disk anyway, disable the cloud's rules with 'enforce = false' in [policy]"


def validate(operation: Operation) -> None:
    """Refuse *operation* if its disks must not have in-guest encryption but do.

    A disk already under a customer-managed key may be moved to another key: moving away from a lost key must
    always be possible.

    :raise PolicyError: When a disk has in-guest encryption, or cannot be inspected.
    """
    match operation:
        case CreateDisk(content=content, encryption_type=kind) if kind is not _PLATFORM_KEY:
            _refuse(content, f"disk {operation.name!r} cannot be under a customer's key", _COMING_IN)
        case MoveDisk(disk=disk, content=content) if disk.encryption_type is _PLATFORM_KEY:
            _refuse(content, f"disk {disk.name!r} cannot be put under a customer's key", _THERE)
        case AttachDisk(disk=disk, content=content, encryption_at_host=True):
            _refuse(content, f"disk {disk.name!r} is incompatible with encryption at host", _THERE)
        case UpdateVm(domain=domain, content=content) if _begins_at_host(operation):
            _refuse(content, f"domain {domain!r} cannot have encryption at host", _THERE)


def _begins_at_host(operation: UpdateVm) -> bool:
    return operation.after.encryption_at_host and not operation.before.encryption_at_host


def _refuse(content: Content | None, refusal: str, hint: str) -> None:
    findings = content.in_guest_encryption() if content else ()
    if findings:
        raise PolicyError(f"{refusal}: it has in-guest encryption, {described(findings)}", hint=hint)

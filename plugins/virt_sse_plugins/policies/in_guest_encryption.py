"""In-guest encryption goes neither with customers' keys nor with encryption at host.

Disks are looked at where one of these begins, and nowhere else: it takes a use of their keys.
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
_THERE = "decrypt it in the guest first; 'virt-sse disk inspect' shows where it is encrypted"
_COMING_IN = "where it must come in all the same: without 'enforce' in [policy], a cloud's rules do not hold"


def validate(operation: Operation) -> None:
    """Refuse *operation* where its disks have in-guest encryption and may not.

    A disk that is under a customer's key already may be moved to another: it must be able to flee from a key.

    :raise PolicyError: When they have, or it cannot be seen.
    """
    match operation:
        case CreateDisk(content=content, encryption_type=kind) if kind is not _PLATFORM_KEY:
            _refuse(content, f"disk {operation.name!r} cannot be under a customer's key", _COMING_IN)
        case MoveDisk(disk=disk, content=content) if disk.encryption_type is _PLATFORM_KEY:
            _refuse(content, f"disk {disk.name!r} cannot be put under a customer's key", _THERE)
        case AttachDisk(disk=disk, content=content, encryption_at_host=True):
            _refuse(content, f"disk {disk.name!r} does not go with encryption at host", _THERE)
        case UpdateVm(domain=domain, content=content) if _begins_at_host(operation):
            _refuse(content, f"domain {domain!r} cannot have encryption at host", _THERE)


def _begins_at_host(operation: UpdateVm) -> bool:
    return operation.after.encryption_at_host and not operation.before.encryption_at_host


def _refuse(content: Content | None, refusal: str, hint: str) -> None:
    findings = content.in_guest_encryption() if content else ()
    if findings:
        raise PolicyError(f"{refusal}: it has in-guest encryption, {described(findings)}", hint=hint)

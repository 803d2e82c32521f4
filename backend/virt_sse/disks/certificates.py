"""Issues deletion certificates.

A certificate is requested in the store before the first step of the deletion. The end of the deletion issues
the certificate, also if a later command finishes the deletion after a kill.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal
from uuid import UUID

import msgspec

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import Result
from virt_sse.keys.host import Host
from virt_sse.keys.signing_key import SigningKeyFile
from virt_sse.model.certificate import (
    CertifiedDek,
    CertifiedDisk,
    DeletionCertificate,
    DeletionStatement,
    RemainingCopy,
)
from virt_sse.model.disks import Disk
from virt_sse.model.events import KeyAction


class DeletionCertificates:
    """Requests, issues and finds the certificates of a host."""

    def __init__(self, host: Host) -> None:
        self._store = host.store
        self._audit = AuditLog.of_host(host.config)
        self.key = SigningKeyFile(host.config.signing_key)

    def request(self, disk: Disk) -> None:
        """Record everything that the certificate about *disk* will need once the disk is gone.

        :raise HostKeyError: When the signing key cannot be made or read.
        :raise AuditError: When the audit log, with former key versions, cannot be read.
        """
        self.key.provision()
        statement = DeletionStatement(
            host=os.uname().nodename,
            deleted="",
            disk=CertifiedDisk(
                id=disk.id,
                name=disk.name,
                path=str(disk.path),
                format=disk.format,
                size=disk.size,
                encryption_type=disk.encryption_type,
                encryption_set=disk.set_id,
                created=disk.created.isoformat(),
            ),
            image="missing",
            deks=tuple(
                CertifiedDek(slot=entry.slot, cipher=str(entry.cipher), keys=keys)
                for entry, keys in zip(disk.deks, self._keys_of(disk), strict=True)
            ),
            remaining=(),
        )
        self._store.certificates.request(disk.id, disk.name, statement.canonical())

    def issue(self, disk: Disk, image: Literal["erased", "missing"]) -> None:
        """Issue the certificate about a deleted disk, if requested.

        :raise HostKeyError: When the signing key cannot be read.
        """
        requested = self._store.certificates.requested(disk.id)
        if requested is None:
            return
        statement = msgspec.structs.replace(
            DeletionStatement.parse(requested),
            deleted=datetime.now(UTC).isoformat(timespec="seconds"),
            image=image,
            remaining=tuple(
                RemainingCopy(
                    kind="linked-clone" if copy.is_linked_clone else copy.kind.value,
                    id=copy.id,
                    name=copy.name,
                )
                for copy in self._store.copies_of(disk)
            ),
        )
        certificate = DeletionCertificate.sign(statement, self.key.provision())
        self._store.certificates.issue(disk.id, certificate.encode(), statement.deleted)

    def all(self) -> Sequence[tuple[UUID, str, str]]:
        """Disk id, disk name and time of deletion of all certificates, oldest first."""
        return self._store.certificates.all()

    def get(self, name: str) -> DeletionCertificate:
        """The newest certificate about a disk with this name or id.

        :raise CertificateError: When there is none.
        """
        return DeletionCertificate.parse(self._store.certificates.get(name))

    def _keys_of(self, disk: Disk) -> list[tuple[str, ...]]:
        """For each DEK of *disk*, the key versions that wrapped the DEK: in the audit log, and now."""
        found: dict[str, dict[str, None]] = {entry.slot: {} for entry in disk.deks}
        for record in self._audit.records(disk=disk.id, result=Result.ALLOWED):
            text = record.document
            if text["action"] == KeyAction.WRAP.value and text["slot"] in found:
                found[text["slot"]][f"{text['key']}:{text['key-version']}"] = None
        for entry in disk.deks:
            keys = found[entry.slot]
            keys.pop(str(entry.wrapped.key), None)
            keys[str(entry.wrapped.key)] = None
        return [tuple(found[entry.slot]) for entry in disk.deks]

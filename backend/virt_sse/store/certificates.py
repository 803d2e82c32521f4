"""Deletion certificates in the store, beyond the life of their disks."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Engine

from virt_sse.errors import CertificateError
from virt_sse.store.engine import reading, writing
from virt_sse.store.statements import is_storable, upsert
from virt_sse.store.tables import certificates


class CertificateStore:
    """Queries and changes, each a transaction. Every method raises StoreError when the database fails.

    A certificate is requested before the deletion, and issued at its end. Documents are texts.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def request(self, disk_id: UUID, name: str, statement: bytes) -> None:
        """Record the statement for a certificate about a disk to be deleted; replaces an earlier one."""
        with writing(self._engine) as connection:
            values = {"name": name, "document": statement.decode(), "issued": None}
            upsert(connection, certificates, {"disk_id": disk_id}, values)

    def requested(self, disk_id: UUID) -> bytes | None:
        """The statement of a certificate that was requested and not issued yet."""
        with reading(self._engine) as connection:
            found = connection.scalar(
                sa.select(certificates.c.document).where(
                    certificates.c.disk_id == disk_id, certificates.c.issued.is_(None)
                )
            )
        return found.encode() if found else None

    def issue(self, disk_id: UUID, certificate: bytes, issued: str) -> None:
        """Replace the statement by the certificate.

        :param issued: time of the end of the deletion, ISO 8601 in UTC.
        """
        with writing(self._engine) as connection:
            connection.execute(
                certificates.update()
                .where(certificates.c.disk_id == disk_id)
                .values(document=certificate.decode(), issued=issued)
            )

    def all(self) -> Sequence[tuple[UUID, str, str]]:
        """Disk id, disk name and time of all issued certificates, oldest first."""
        columns = (certificates.c.disk_id, certificates.c.name, certificates.c.issued)
        query = sa.select(*columns).where(certificates.c.issued.is_not(None)).order_by(certificates.c.issued)
        with reading(self._engine) as connection:
            return [(disk_id, name, issued) for disk_id, name, issued in connection.execute(query)]

    def get(self, name: str) -> bytes:
        """The newest certificate about a disk with this name or id.

        :raise CertificateError: When there is none.
        """
        wanted = certificates.c.name == name
        with contextlib.suppress(ValueError):
            wanted = sa.or_(wanted, certificates.c.disk_id == UUID(name))
        query = (
            sa.select(certificates.c.document)
            .where(wanted, certificates.c.issued.is_not(None))
            .order_by(certificates.c.issued.desc())
            .limit(1)
        )
        found = None
        if is_storable(name):
            with reading(self._engine) as connection:
                found = connection.scalar(query)
        if found is None:
            raise CertificateError(
                f"no deletion certificate about a disk {name[:80]!r}",
                hint="'virt-sse certificate list' shows all certificates",
            )
        return str(found).encode()

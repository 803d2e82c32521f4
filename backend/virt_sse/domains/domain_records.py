"""Records about domains on this host: a JSON document per domain, in a private folder, named by the UUID."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar
from uuid import UUID

import msgspec

from virt_sse.config import Config
from virt_sse.errors import VmStateError
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import private_folder, sync_folder, write_private

_SUFFIX = ".json"

T = TypeVar("T", bound=msgspec.Struct)


class DomainRecords(Generic[T]):
    """The records of one kind, at most one per domain.

    :param kind: the type of a record.
    """

    def __init__(self, folder: Path, kind: type[T]) -> None:
        self._folder = folder
        self._kind = kind

    def all(self) -> Iterator[tuple[UUID, T]]:
        """The records by the UUIDs of their domains; unreadable records are left out."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                domain_id = UUID(path.stem)
                found = self.get(domain_id)
            except (ValueError, VmStateError):
                continue
            if found:
                yield domain_id, found

    def get(self, domain_id: UUID) -> T | None:
        """The record of a domain, if any.

        :raise VmStateError: When the record cannot be read.
        """
        path = self._path(domain_id)
        try:
            return from_json(path.read_bytes(), self._kind)
        except FileNotFoundError:
            return None
        except (OSError, DocumentError) as exc:
            raise VmStateError(f"cannot read {path}: {exc}") from exc

    def put(self, domain_id: UUID, record: T) -> None:
        """Replace the record of a domain, durably.

        :raise VmStateError: When the record cannot be written.
        """
        path = self._path(domain_id)
        try:
            private_folder(self._folder)
            write_private(path, msgspec.json.encode(record, enc_hook=str))
        except OSError as exc:
            raise VmStateError(f"cannot write {path}: {exc.strerror}") from exc

    def remove(self, domain_id: UUID) -> None:
        """Remove the record of a domain, if any, durably.

        :raise VmStateError: When the record cannot be removed.
        """
        path = self._path(domain_id)
        try:
            path.unlink()
            sync_folder(self._folder)
        except FileNotFoundError:
            return
        except OSError as exc:
            raise VmStateError(f"cannot remove {path}: {exc.strerror}") from exc

    def _path(self, domain_id: UUID) -> Path:
        return self._folder / f"{domain_id}{_SUFFIX}"


class NewDomain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The record of a domain that is being made (:mod:`virt_sse.domains.new_domains`).

    :ivar disks: ids of its new disks; not of existing disks that the domain gets.
    """

    disks: tuple[UUID, ...]


def new_domain_records(config: Config) -> DomainRecords[NewDomain]:
    """The records of this host's domains that are being made, or were by a killed command."""
    return DomainRecords(config.new_domains, NewDomain)

"""Records of overlay commits (:mod:`~virt_sse.agent.overlay_commit`), for the next agent to continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self
from uuid import UUID

import msgspec

from virt_sse.errors import AgentError
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import private_folder, sync_folder, write_private

_Number = Annotated[int, msgspec.Meta(ge=0)]


class _OverlayDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: Path
    device: _Number
    inode: _Number


class _OverlayCommitDocument(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"
):
    domain_id: UUID
    domain: str
    target: str
    disk: UUID
    token: str
    overlays: tuple[_OverlayDocument, ...]
    committed: bool


@dataclass(frozen=True, slots=True)
class Overlay:
    """A plaintext overlay.

    :ivar identity: device and inode of the file.
    """

    path: Path
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class OverlayCommitRecord:
    """A commit of a disk's overlays.

    :ivar target: the disk's name in the guest; letters and digits.
    :ivar token: also in the running domain's metadata, which end with the run in which the commit began.
    :ivar is_committed: whether all data is in the disk, and the domain has closed the overlays.
    """

    domain_id: UUID
    domain: str
    target: str
    disk_id: UUID
    token: str
    overlays: tuple[Overlay, ...]
    is_committed: bool = False

    @classmethod
    def read_all(
        cls, folder: Path, damaged: Callable[[Path, AgentError], object] = lambda _path, _error: None
    ) -> list[Self]:
        """All records in *folder*.

        :param damaged: called for each unreadable record; these records are left out.
        """
        found = []
        for path in sorted(folder.glob("*.json")):
            try:
                found.append(cls._read(path))
            except AgentError as exc:
                damaged(path, exc)
        return found

    @classmethod
    def _read(cls, path: Path) -> Self:
        """:raise AgentError: When the record is damaged; the message names the field."""
        try:
            fields = from_json(path.read_bytes(), _OverlayCommitDocument)
        except OSError as exc:
            raise AgentError(f"cannot read {path}: {exc.strerror}") from exc
        except DocumentError as exc:
            hint = "correct the file; or remove it once its overlays are committed or not needed, and erased"
            raise AgentError(f"damaged overlay commit record {path}: {exc}", hint=hint) from exc
        return cls(
            domain_id=fields.domain_id,
            domain=fields.domain,
            target=fields.target,
            disk_id=fields.disk,
            token=fields.token,
            overlays=tuple(Overlay(each.path, (each.device, each.inode)) for each in fields.overlays),
            is_committed=fields.committed,
        )

    def write(self, folder: Path) -> None:
        """Write the record durably into *folder*.

        :raise OSError: When that fails.
        """
        private_folder(folder)
        fields = {
            "domain-id": str(self.domain_id),
            "domain": self.domain,
            "target": self.target,
            "disk": str(self.disk_id),
            "token": self.token,
            "overlays": [
                {"path": str(each.path), "device": each.identity[0], "inode": each.identity[1]}
                for each in self.overlays
            ],
            "committed": self.is_committed,
        }
        write_private(record_path(folder, self.domain_id, self.target), json.dumps(fields).encode())

    def remove(self, folder: Path) -> None:
        """Remove the record from *folder*, durably.

        :raise OSError: When that fails.
        """
        record_path(folder, self.domain_id, self.target).unlink(missing_ok=True)
        sync_folder(folder)


def record_path(folder: Path, domain_id: UUID, target: str) -> Path:
    """The file of the record for a domain's disk."""
    return folder / f"{domain_id}-{target}.json"

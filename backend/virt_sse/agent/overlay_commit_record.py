"""What an agent notes of a fold before it begins, so that the next one can go on with it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from uuid import UUID

from virt_sse.system.files import private_folder, sync_folder, write_private


@dataclass(frozen=True, slots=True)
class Overlay:
    """A plaintext overlay.

    :ivar identity: its device and inode.
    """

    path: Path
    identity: tuple[int, int]


@dataclass(frozen=True, slots=True)
class FoldRecord:
    """A fold of a disk's overlays.

    :ivar target: the disk's name in the guest; letters and digits.
    :ivar token: in the metadata of the domain while it is in the run in which the fold has begun.
    :ivar is_committed: whether the domain has let go of the overlays, and all that is in them is in the disk.
    """

    domain_id: UUID
    domain: str
    target: str
    disk_id: UUID
    token: str
    overlays: tuple[Overlay, ...]
    is_committed: bool = False

    @classmethod
    def read_all(cls, folder: Path) -> list[Self]:
        """All that there are in *folder*; those that make no sense are left out."""
        found = []
        for path in sorted(folder.glob("*.json")):
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                fields = json.loads(path.read_bytes())
                overlays = [
                    Overlay(Path(each["path"]), (each["device"], each["inode"]))
                    for each in fields["overlays"]
                ]
                found.append(
                    cls(
                        domain_id=UUID(fields["domain-id"]),
                        domain=fields["domain"],
                        target=fields["target"],
                        disk_id=UUID(fields["disk"]),
                        token=fields["token"],
                        overlays=tuple(overlays),
                        is_committed=fields["committed"],
                    )
                )
        return found

    def write(self, folder: Path) -> None:
        """Make it durable in *folder*.

        :raise OSError: When it cannot be written.
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
        write_private(self._path(folder), json.dumps(fields).encode())

    def remove(self, folder: Path) -> None:
        """Forget it.

        :raise OSError: When it cannot be removed.
        """
        self._path(folder).unlink(missing_ok=True)
        sync_folder(folder)

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.domain_id}-{self.target}.json"

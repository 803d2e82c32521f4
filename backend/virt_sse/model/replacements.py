"""Copies: the content of a disk or of a plaintext image on the way into a new encrypted disk.

A re-encryption copies a disk into a new disk with DEKs of its own, which then takes over the name. An
encryption in place copies a plaintext image of a domain. The record of a copy is written before anything
else: after a kill, the record and the block graph or the definition of the domain tell which of both holds
the data.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID, uuid5


class ReplacementState(enum.Enum):
    """Progress of a copy.

    Up to ``PIVOTING`` the source is whole. In ``PIVOTING`` the domain may be paused by the copy, and source
    and new disk have the same content if the domain uses the new disk. From ``DONE`` on the new disk is the
    disk, and only the removal of the source and the rewriting of definitions remain. ``KEPT``: nothing
    remains to do; a plaintext image is kept until the operator has it wiped.
    """

    COPYING = "copying"
    PIVOTING = "pivoting"
    DONE = "done"
    KEPT = "kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """The record of a copy.

    :ivar disk_id: the new disk.
    :ivar name: name of the new disk once the copy is done.
    :ivar source_id: the disk to be replaced; ``None`` for a plaintext image.
    :ivar source_path: the plaintext image; ``None`` for a disk.
    :ivar source_identity: device and inode of this image: another file of the same name is never wiped.
    :ivar final_path: path of the new disk's image once the source is removed, if not the present path.
    :ivar domain_id: the running domain whose QEMU copies, or the stopped domain of a plaintext image;
        ``None`` for a disk without a running domain.
    :ivar target: the disk's name in this domain; else empty.
    :ivar is_detached: whether the agent continues the copy when the command has ended.
    :ivar is_cancelled: whether the copy is to be undone.
    :ivar max_rate: upper bound in bytes/s.
    """

    disk_id: UUID
    name: str
    source_id: UUID | None = None
    source_path: Path | None = None
    source_identity: tuple[int, int] | None = None
    final_path: Path | None = None
    domain_id: UUID | None = None
    target: str = ""
    state: ReplacementState = ReplacementState.COPYING
    is_detached: bool = False
    is_cancelled: bool = False
    max_rate: int | None = None

    @property
    def lock_id(self) -> UUID:
        """Id of the lock that excludes other work on the copy: the source's, or one of a plaintext image."""
        return self.source_id or uuid5(self.disk_id, "source")

"""The record of a disk's stage processes, from which any later command can go on with them or end them.

Written as ``stages.json``; records of running domains outlive upgrades, so fields are added, never changed.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self, cast
from uuid import UUID

import msgspec

from virt_sse.errors import StageError
from virt_sse.libvirt.secret_name import plain_export
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import Stage
from virt_sse.stages.host_cache import HostCacheProcess
from virt_sse.stages.kinds import STAGE_KINDS, StageKinds, by_process
from virt_sse.stages.storage_daemon import StorageDaemonProcess
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import private_folder, write_private

RECORD_NAME = "stages.json"

_UserId = Annotated[int, msgspec.Meta(ge=0, lt=2**32 - 1)]
"""Without ``(uid_t) -1``, which means "unchanged" to chown(2)."""
_FORMER_ORDER = (HostCacheProcess.name, StorageDaemonProcess.name)
"""Of the processes in records without an order, guest first."""


class _CommonFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    disk: UUID
    domain_id: UUID
    domain: str
    image: Path
    format: DiskFormat
    owner: tuple[_UserId, _UserId]
    qemu: tuple[_UserId, _UserId]
    storage: tuple[_UserId, _UserId]
    guest_slot: str | None
    users: dict[str, tuple[_UserId, _UserId]] = {}
    gated: bool = False
    order: tuple[str, ...] = _FORMER_ORDER
    base: tuple[UUID, Path, _UserId, _UserId] | None = None


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """The image below a linked clone.

    :ivar owner: owner of the image before a storage daemon was let open the image.
    """

    disk_id: UUID
    path: Path
    owner: User


@dataclass(frozen=True, slots=True)
class StageRecord:
    """The stages of a disk in a domain.

    :ivar owner: owner of the image before the stages were started.
    :ivar qemu: user of the domain's QEMU.
    :ivar storage: user of the process next to the storage.
    :ivar users: user of each process by the name of its kind; empty in the records of earlier
        versions: all processes run as *storage* then.
    :ivar guest_slot: slot of the DEK for the guest's QEMU; ``None`` if the guest's QEMU has no DEK.
    :ivar stages: the stages below the guest's QEMU, guest first.
    :ivar gated: whether a gate stands before the stage process next to the guest
        (:mod:`~virt_sse.stages.gate`); processes started by earlier versions have none.
    :ivar base: the image below, if the disk is a linked clone.
    """

    disk_id: UUID
    domain_id: UUID
    domain: str
    image: Path
    format: DiskFormat
    owner: User
    qemu: User
    storage: User
    guest_slot: str | None
    stages: tuple[Stage, ...]
    users: Mapping[str, User] = field(default_factory=dict)
    gated: bool = True
    base: RecordedBase | None = None

    def user(self, name: str) -> User:
        """The user of the process of the kind *name*."""
        return self.users.get(name, self.storage)

    @property
    def export(self) -> str:
        """Name of the NBD export for the guest's QEMU.

        Two names: a domain whose definition expects the other placement is refused, instead of reading
        ciphertext or writing plaintext into a volume.
        """
        return str(self.disk_id) if self.guest_slot else plain_export(self.disk_id)

    @property
    def user_ids(self) -> set[int]:
        """The user ids of all stage processes."""
        return {self.storage.uid, *(user.uid for user in self.users.values())}

    @classmethod
    def read(cls, folder: Path, kinds: StageKinds = STAGE_KINDS) -> Self | None:
        """The record in *folder*; ``None`` if the file is missing.

        :raise StageError: When the record is damaged; the message names the field.
        """
        path = folder / RECORD_NAME
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as exc:
            raise StageError(f"cannot read {path}: {exc.strerror}") from exc
        hint = "correct the file; or remove it if no running domain uses the disk"
        try:
            found = from_json(content, _document_type(kinds))
        except DocumentError as exc:
            raise StageError(f"damaged stage record {path}: {exc}", hint=hint) from exc
        by_name = {kind.name: kind for kind in kinds}
        rest = [kind.name for kind in kinds if kind.name not in found.order]
        if len({*found.order, *rest}) < len(found.order) + len(rest) or not by_name.keys() >= {*found.order}:
            raise StageError(f"damaged stage record {path}: order", hint=hint)
        ordered = [by_name[name] for name in (*found.order, *rest)]
        stages = [kind.from_record(getattr(found, kind.record_field.name)) for kind in ordered]
        return cls(
            disk_id=found.disk,
            domain_id=found.domain_id,
            domain=found.domain,
            image=found.image,
            format=found.format,
            owner=User(*found.owner),
            qemu=User(*found.qemu),
            storage=User(*found.storage),
            guest_slot=found.guest_slot,
            stages=tuple(itertools.chain.from_iterable(stages)),
            users={name: User(*user) for name, user in found.users.items()},
            gated=found.gated,
            base=RecordedBase(*found.base[:2], User(*found.base[2:])) if found.base else None,
        )

    def write(self, folder: Path, kinds: StageKinds = STAGE_KINDS) -> None:
        """Write the record durably into *folder*.

        :raise OSError: When that fails.
        """
        private_folder(folder.parent)
        private_folder(folder)
        fields: dict[str, object] = {
            "disk": str(self.disk_id),
            "domain-id": str(self.domain_id),
            "domain": self.domain,
            "image": str(self.image),
            "format": self.format.value,
            "owner": [self.owner.uid, self.owner.gid],
            "qemu": [self.qemu.uid, self.qemu.gid],
            "storage": [self.storage.uid, self.storage.gid],
            "guest-slot": self.guest_slot,
            "users": {name: [user.uid, user.gid] for name, user in self.users.items()},
            "gated": self.gated,
            "order": [kind.name for kind, _ in by_process(self.stages, kinds)],
        }
        if base := self.base:
            fields["base"] = [str(base.disk_id), str(base.path), base.owner.uid, base.owner.gid]
        for kind in kinds:
            stages = [each for each in self.stages if isinstance(each, kind.stage_type)]
            fields[kind.record_field.name.replace("_", "-")] = kind.to_record(stages)
        write_private(folder / RECORD_NAME, json.dumps(fields).encode())


def age(folder: Path) -> float:
    """Seconds since the record in *folder* was written, at the start of the stages or a restart.

    :raise StageError: When the record cannot be seen.
    """
    try:
        return time.time() - (folder / RECORD_NAME).stat().st_mtime
    except OSError as exc:
        raise StageError(f"cannot see the record in {folder}: {exc.strerror}") from exc


@functools.cache
def _document_type(kinds: StageKinds) -> type[_CommonFields]:
    fields = [(each.name, each.type, each.default) for each in (kind.record_field for kind in kinds)]
    made = msgspec.defstruct(
        "StageDocument",
        fields,
        bases=(_CommonFields,),
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
        rename="kebab",
    )
    return cast("type[_CommonFields]", made)

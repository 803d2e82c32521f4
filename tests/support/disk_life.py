"""The life of a disk, step by step, under a guest that writes with checksums all the time."""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support.agent_site import CustomerSite, key_of
from support.stage_site import StageSite
from support.writing_guest import SPACE, WritingGuest
from virt_sse.errors import DiskNotFoundError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import disk_xml
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.layers import EncryptionType

SIZE = SPACE + (2 << 20) + 512
"""Bytes of the disk: no multiple of a mebibyte."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of the life.

    :ivar arguments: of ``virt-sse``.
    :ivar is_done: whether the step has taken effect.
    :ivar prepare: what other hands do before, e.g. a key administrator's.
    """

    name: str
    arguments: tuple[str | Path, ...]
    is_done: Callable[[], bool]
    prepare: Callable[[], object] = lambda: None


class DiskLife:
    """A running domain with a plaintext disk, and the steps of the disk's life.

    :ivar stages: runs commands on the host.
    :ivar customer, double: sets under two customer keys, with one layer and with two.
    """

    def __init__(self, site: CustomerSite, linux: Acceleration, boot: LinuxMicro) -> None:
        self._site = site
        self.backend = site.backend
        self.stages = StageSite(site.host, site.backend, linux)
        self.name = f"life-{uuid.uuid4().hex[:8]}"
        self.disk = f"{self.name}-vda"
        self.snapshot, self.second, self.third = (f"{self.name}-{each}" for each in ("snap", "two", "three"))
        self.plain = site.host.images / f"{self.name} pläin, 1:2.raw"
        self.folder = site.host.directory / f"bäckup, {self.name}"
        self.folder.mkdir()
        self.customer = site.new_set()
        self.double = self._double_set()
        with self.plain.open("wb") as file:
            file.truncate(SIZE)
        self._linux, self._boot = linux, boot
        self.guest = self.writing_guest(self.name, disk_xml(self.plain))
        self.guest.define()

    def writing_guest(self, name: str, disk: str) -> WritingGuest:
        """A guest on another disk; not defined yet."""
        return WritingGuest(self._site.host, name, disk=disk, acceleration=self._linux, boot=self._boot)

    def _double_set(self) -> EncryptionSet:
        made = self.backend.sets.create(
            f"{self.name}-double",
            provider="customer-managed",
            key=self._site.keys.new_key(),
            encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
        )
        self._site.grant(made)
        return made

    def steps(self, *, rate: str | None = None) -> list[Step]:
        """All steps, in their order.

        :param rate: upper bound of the copies under the running guest, as of ``--max-rate``.
        """
        slow = ("--max-rate", rate) if rate else ()
        images, disk = self._site.host.images, self.disk
        return [
            Step("encrypt", ("vm", "encrypt", self.name, *slow), lambda: self._has(disk)),
            Step(
                "associate",
                ("disk", "update", disk, "--des", self.customer.name),
                lambda: self._stored().set_id == self.customer.id,
            ),
            Step(
                "snapshot",
                ("snapshot", "create", self.snapshot, "--disk", disk),
                lambda: self._has(self.snapshot),
            ),
            Step(
                "rotate",
                ("des", "rotate", self.customer.name, "--prove"),
                self._is_rotated,
                self._rotate_key,
            ),
            Step(
                "reencrypt",
                ("disk", "reencrypt", disk, "--des", self.double.name, *slow),
                lambda: self._stored().set_id == self.double.id,
            ),
            Step(
                "backup",
                ("disk", "backup", disk, self.folder, "--des", self.customer.name),
                lambda: len(self.points()) == 1,
            ),
            Step(
                "increment",
                ("disk", "backup", disk, self.folder, "--des", self.customer.name, "--incremental"),
                lambda: len(self.points()) == 2,
            ),
            Step(
                "restore-snapshot",
                (
                    "snapshot",
                    "restore",
                    self.snapshot,
                    self.second,
                    "--path",
                    images / f"{self.second}.qcow2",
                ),
                lambda: self._has(self.second),
            ),
        ]

    def points(self) -> list[Disk]:
        """The restore points of the disk, the newest last."""
        points = self.backend.disks.all(DiskKind.RESTORE_POINT)
        mine = [each for each in points if each.name.startswith(f"{self.disk}.")]
        return sorted([each for each in mine if each.state is DiskState.READY], key=lambda each: each.name)

    def _stored(self) -> Disk:
        return self.backend.disks.get(self.disk)

    def _has(self, name: str) -> bool:
        with contextlib.suppress(DiskNotFoundError):
            return self.backend.disks.get(name).state is DiskState.READY
        return False

    def _rotate_key(self) -> None:
        self._old_key = key_of(self._stored())
        self._site.keys.rotate(self.customer.key.name)

    def _is_rotated(self) -> bool:
        return self._old_key not in (key_of(self._stored()), key_of(self.backend.disks.get(self.snapshot)))

    def end(self) -> None:
        """End the domain, and erase all of the life."""
        with contextlib.suppress(Exception):  # ended already
            self.guest.destroy()
        self.guest.undefine()
        kinds = (DiskKind.RESTORE_POINT, DiskKind.SNAPSHOT, DiskKind.DISK)
        for kind in kinds:
            mine = [each for each in self.backend.disks.all(kind) if each.name.startswith(self.name)]
            for disk in sorted(mine, key=lambda each: each.name, reverse=True):  # increments first
                self.backend.disks.erase(disk)
        self.plain.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

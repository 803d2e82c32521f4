"""Dirty bitmaps: what a guest wrote since a copy of its disk, and copies of exactly that.

A bitmap begins at the point in time of a copy and is named by the id of the copy. A bitmap is in the memory
of the QEMU process that does all writes of the guest, and never in an image: the end of the process ends the
bitmap, and storage cannot forge one. A disk that has taken the place of another, e.g. by a block copy, has
none of the other's bitmaps. Whatever changes a disk without a bitmap is found by comparison instead
(:mod:`virt_sse.disks.increments`).

QEMU's backup job (QEMU ``docs/interop/bitmaps.rst``) copies the clusters in a bitmap as they were when the
job began, while the guest goes on. The job writes to the NBD socket of a storage daemon that has the keys of
the copy; the guest's QEMU gets none.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import libvirt

from virt_sse.errors import MonitorError
from virt_sse.libvirt import domains
from virt_sse.libvirt.monitor import ask
from virt_sse.model.disks import Disk
from virt_sse.qemu.difference import CLUSTER

_log = logging.getLogger(__name__)

_PREFIX = "virt-sse-"
_MOST_BITMAPS = 8
"""Bitmaps of a disk, at most: each costs a little of every write of the guest."""
_POLL_SECONDS = 0.05
_ENDING_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class DiskNode:
    """The block node of a disk in a running domain's QEMU.

    :ivar name: its node name.
    :ivar bitmaps: the copies since whose point in time a usable bitmap records all writes.
    """

    name: str
    bitmaps: frozenset[UUID]

    @classmethod
    def of(cls, domain: libvirt.virDomain, alias: str) -> DiskNode:
        """Find the node of a device of the domain.

        :param alias: libvirt's name of the device.
        :raise MonitorError: When QEMU does not name the node.
        """
        try:
            for device in ask(domain, "query-block"):
                if alias in str(device.get("qdev", "")).split("/") and "inserted" in device:
                    found = device["inserted"]
                    listed = found.get("dirty-bitmaps", [])
                    usable = {str(each.get("name")) for each in listed if _is_usable(each)}
                    return cls(str(found["node-name"]), frozenset(_copies_named(usable)))
        except (AttributeError, KeyError, TypeError) as exc:
            raise MonitorError("QEMU describes its disks in an unknown format") from exc
        raise MonitorError(f"QEMU has no disk {alias!r}")


def _is_usable(bitmap: Mapping[str, Any]) -> bool:
    """Whether a bitmap has recorded all writes since it was made, and is ours: in memory alone."""
    wanted = {"recording": True, "busy": False, "persistent": False, "granularity": CLUSTER}
    is_intact = not bitmap.get("inconsistent", False)
    return is_intact and all(bitmap[name] == value for name, value in wanted.items())


def _copies_named(names: Collection[str]) -> Iterator[UUID]:
    for name in names:
        if name.startswith(_PREFIX):
            with contextlib.suppress(ValueError):
                yield UUID(name.removeprefix(_PREFIX))


def prune(domain: libvirt.virDomain, node: DiskNode, known: Sequence[Disk], kept: UUID | None) -> None:
    """Remove the bitmaps of a disk since deleted copies and copies that have a successor, and the oldest.

    :param known: the copies in the store that have bitmaps.
    :param kept: the copy whose bitmap is about to be used.
    """
    superseded = {copy.base_id for copy in known}
    useful = sorted((each for each in known if each.id not in superseded), key=lambda each: each.created)
    keep = {each.id for each in useful[-_MOST_BITMAPS:]} | {kept}
    for copy_id in node.bitmaps - keep:
        _remove(domain, node.name, copy_id)


def forget(domain: libvirt.virDomain, disk_id: UUID) -> None:
    """Remove all bitmaps of a disk: the next copy is made by comparison.

    :raise MonitorError: When QEMU does not answer.
    """
    for chain in domains.definition(domain).disk_chains():
        if chain.disk_id == disk_id:
            node = DiskNode.of(domain, chain.alias)
            for copy_id in node.bitmaps:
                _remove(domain, node.name, copy_id)


def _remove(domain: libvirt.virDomain, node: str, copy_id: UUID) -> None:
    """Remove the bitmap since a copy, if there is one."""
    with contextlib.suppress(MonitorError):
        ask(domain, "block-dirty-bitmap-remove", node=node, name=f"{_PREFIX}{copy_id}")


@dataclass(frozen=True, slots=True)
class BitmapCopy:
    """A copy of what changed, to be made by QEMU.

    :ivar node: node name of the disk.
    :ivar base_id: the copy below, since whose point in time the bitmap records.
    :ivar copy_id: the copy.
    """

    node: str
    base_id: UUID
    copy_id: UUID

    @property
    def job(self) -> str:
        """The id of the job."""
        return f"{_PREFIX}{self.copy_id}"

    def connect(self, domain: libvirt.virDomain, socket: Path, export: str) -> None:
        """Connect QEMU to the storage daemon of the copy.

        :raise MonitorError: When QEMU cannot connect.
        """
        server = {"type": "unix", "path": str(socket)}
        ask(
            domain,
            "blockdev-add",
            driver="nbd",
            node_name=_target(self.copy_id),
            server=server,
            export=export,
        )


def begin(domain: libvirt.virDomain, nodes: Mapping[UUID, str], increments: Sequence[BitmapCopy]) -> None:
    """At one point in time, begin the bitmaps since new copies, and the jobs that copy what changed before.

    The guest is paused. Either all is begun or nothing.

    :param nodes: by copy, the node name of its disk.
    :raise MonitorError: When QEMU refuses.
    """
    actions: list[dict[str, object]] = [
        _action("block-dirty-bitmap-add", node=node, name=f"{_PREFIX}{copy_id}", granularity=CLUSTER)
        for copy_id, node in nodes.items()
    ]
    actions += [
        _action(
            "blockdev-backup",
            job_id=each.job,
            device=each.node,
            target=_target(each.copy_id),
            sync="bitmap",
            bitmap=f"{_PREFIX}{each.base_id}",
            bitmap_mode="never",  # the bitmap stays as long as the copy below has no successor
            auto_dismiss=False,
        )
        for each in increments
    ]
    if increments:
        ask(domain, "transaction", actions=actions)
    elif actions:
        try:
            ask(domain, "transaction", actions=actions)
        except MonitorError as exc:
            _log.warning("QEMU keeps no dirty bitmap of domain %s: %s", domain.name(), exc)


def finish(
    domain: libvirt.virDomain, increments: Sequence[BitmapCopy], progress: Callable[[float], None]
) -> dict[UUID, int]:
    """Wait until all increments are complete and written.

    :return: by copy, the bytes that were read.
    :raise MonitorError: When a job fails, or the domain ends.
    """
    while True:
        jobs = _jobs(domain)
        try:
            mine = [(each, jobs[each.job]) for each in increments]
            read = {each.copy_id: int(job["total-progress"]) for each, job in mine}
            done = sum(int(job["current-progress"]) for _, job in mine)
            for _, job in mine:
                if "error" in job:
                    raise MonitorError(f"QEMU cannot copy what changed: {job['error']}")
            if all(job["status"] == "concluded" for _, job in mine):
                break
        except (KeyError, TypeError, ValueError) as exc:
            raise MonitorError("QEMU lost the job that copies what changed") from exc
        progress(done / max(sum(read.values()), 1))
        time.sleep(_POLL_SECONDS)
    for each in increments:
        ask(domain, "job-dismiss", id=each.job)
        ask(domain, "blockdev-del", node_name=_target(each.copy_id))  # which flushes the copy
    return read


def end(domain: libvirt.virDomain, alias: str, copy_id: UUID, *, is_failed: bool) -> None:
    """End all that QEMU does for a copy, and forget the bitmap since a copy that has failed.

    :raise MonitorError: When the job of the copy cannot be ended.
    """
    job = f"{_PREFIX}{copy_id}"
    deadline = time.monotonic() + _ENDING_SECONDS
    while found := _jobs(domain).get(job):
        concluded = found.get("status") == "concluded"
        with contextlib.suppress(MonitorError):  # ended or concluded meanwhile
            if concluded:
                ask(domain, "job-dismiss", id=job)
            else:
                ask(domain, "block-job-cancel", device=job, force=True)
        if time.monotonic() > deadline:
            raise MonitorError(f"QEMU does not end the job {job}")
        time.sleep(0 if concluded else _POLL_SECONDS)
    with contextlib.suppress(MonitorError):  # there is none
        ask(domain, "blockdev-del", node_name=_target(copy_id))
    if is_failed:
        _remove(domain, DiskNode.of(domain, alias).name, copy_id)


def _action(kind: str, **data: object) -> dict[str, object]:
    return {"type": kind, "data": {name.replace("_", "-"): value for name, value in data.items()}}


def _target(copy_id: UUID) -> str:
    """The node name of the NBD client of a copy: at most 31 characters."""
    return "vs-" + base64.b32encode(copy_id.bytes).decode().rstrip("=").lower()


def _jobs(domain: libvirt.virDomain) -> dict[str, Any]:
    try:
        return {str(job["id"]): job for job in ask(domain, "query-jobs")}
    except (KeyError, TypeError) as exc:
        raise MonitorError("QEMU lists its jobs in an unknown format") from exc

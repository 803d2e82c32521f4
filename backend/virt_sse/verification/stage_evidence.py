"""Evidence from the processes below QEMU: block graph of the storage daemon, open files and sockets."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import ImageFormatError, VirtSseError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.layers import HostCache, HostCaching, LayerPlan, StorageNode
from virt_sse.qemu.qcow2 import Qcow2Header
from virt_sse.qemu.storage_daemon import FILE_NODE, VOLUME_NODE
from virt_sse.stages import Stages
from virt_sse.stages.process import Process
from virt_sse.stages.record import StageRecord
from virt_sse.verification import sample
from virt_sse.verification.graph import cipher_of, place_of
from virt_sse.verification.processes import OpenFile, command_line, has_open, listens_at, open_files
from virt_sse.verification.verdict import DataPlace, DiskVerdict, Layer

HOST_CACHE, STORAGE_DAEMON = "host cache", "storage daemon"
_NAMES = {"cache": HOST_CACHE, "storage": STORAGE_DAEMON}


class StageEvidence:
    """Checks the stages of running domains' disks."""

    def __init__(self, config: Config, stages: Stages) -> None:
        self._config = config
        self._stages = stages

    def check(self, verdict: DiskVerdict, disk: Disk, plan: LayerPlan, vm_id: UUID) -> None:
        """Check that exactly the stages requested by *plan* run, and work as requested."""
        caching = next((s.caching for s in plan.stages if isinstance(s, HostCache)), HostCaching.NONE)
        slot = next((stage.slot for stage in plan.stages if isinstance(stage, StorageNode)), None)
        record = self._stages.record(disk.id)
        if record is None:
            is_none = caching is HostCaching.NONE and slot is None
            verdict.expect(is_none, "no stage runs between the guest's QEMU and the image")
            return
        verdict.expect(record.domain_id == vm_id, f"the stages below QEMU belong to domain {record.domain!r}")
        verdict.expect(
            record.caching is caching,
            f"host caching is {record.caching.value} instead of {caching.value}",
        )
        verdict.expect(
            record.storage_slot == slot,
            "a storage daemon runs without being requested"
            if record.storage_slot
            else "the storage daemon is missing",
        )
        dead = self._stages.dead(record)
        for name in dead:
            verdict.expect(False, f"the {_NAMES[name]} does not run")
        guest = self._stages.guest_socket(disk.id)
        inner = guest.parent.parent / "stages/nbd"
        if record.has_cache and "cache" not in dead:
            self._check_cache(verdict, disk, record, guest, inner)
        if record.storage_slot is not None and "storage" not in dead:
            self._check_storage(verdict, disk, record.storage_slot, inner if record.has_cache else guest)

    def _check_storage(self, verdict: DiskVerdict, disk: Disk, slot: str, socket: Path) -> None:
        entry = disk.dek(slot)
        pid = self._pid(verdict, disk, "storage")
        try:
            nodes = {str(node["node-name"]): node for node in self._stages.storage_daemon(disk.id).nodes()}
        except VirtSseError as exc:
            verdict.expect(False, f"the storage daemon does not answer: {exc}")
            return
        cipher = cipher_of(nodes[VOLUME_NODE]) if VOLUME_NODE in nodes else None
        verdict.layers.append(Layer(STORAGE_DAEMON, cipher, slot, str(entry.wrapped.key), _process(pid)))
        verdict.expect(
            cipher == str(entry.cipher), f"the storage daemon encrypts with {cipher}, not {entry.cipher}"
        )
        more = sorted(nodes.keys() - {FILE_NODE, VOLUME_NODE})
        verdict.expect(not more, f"the storage daemon has unexpected block nodes: {', '.join(more)}")
        if FILE_NODE in nodes:
            place = place_of(str(nodes[FILE_NODE]["file"])).path
            verdict.expect(
                place == disk.path, f"the storage daemon has the data in {place} instead of {disk.path}"
            )
        if pid:
            verdict.expect(
                has_open(pid, disk.path),
                f"the storage daemon has another file open than {disk.path}: it was replaced",
            )
            verdict.expect(
                listens_at(pid, socket), f"a different process, not the storage daemon, listens at {socket}"
            )
        verdict.places.append(
            DataPlace("the storage daemon's memory: ciphertext of the guest's layer", False)
        )

    def _check_cache(
        self, verdict: DiskVerdict, disk: Disk, record: StageRecord, guest: Path, inner: Path
    ) -> None:
        pid = self._pid(verdict, disk, "cache")
        if not pid:
            return
        verdict.expect(listens_at(pid, guest), f"a different process, not the host cache, listens at {guest}")
        arguments = command_line(pid)
        if record.storage_slot is not None:
            verdict.expect(
                f"socket={inner}" in arguments and not has_open(pid, disk.path),
                "the host cache is not connected to the storage daemon",
            )
        else:
            verdict.expect(
                has_open(pid, disk.path),
                f"the host cache has another file open than {disk.path}: it was replaced",
            )
        mode = "cache=writeback" if record.caching is HostCaching.READ_WRITE else "cache=writethrough"
        verdict.expect(mode in arguments, f"the host cache does not run in mode {record.caching.value}")
        cached = [file for file in open_files(pid) if Path(file.name).parent == self._config.cache_directory]
        verdict.expect(bool(cached), f"the host cache has no file in {self._config.cache_directory}")
        for file in cached:
            verdict.expect(file.is_unnamed, f"the host cache's file {file.name} has a name")
            self._sample(verdict, disk, pid, file)
        verdict.places.append(DataPlace(f"the host cache, in {self._config.cache_directory}", False))

    def _sample(self, verdict: DiskVerdict, disk: Disk, pid: int, file: OpenFile) -> None:
        try:
            descriptor = os.open(f"/proc/{pid}/fd/{file.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                is_qcow2 = disk.format is DiskFormat.QCOW2
                headers = {0, _luks_offset(descriptor) if is_qcow2 else 0}
                found = sample.look_at(descriptor, headers, has_tables=is_qcow2)
            finally:
                os.close(descriptor)
        except OSError as exc:
            verdict.expect(False, f"the host cache's file cannot be read: {exc.strerror}")
            return
        detail = f"{_process(pid)}; sectors sampled: {found.ciphertext} ciphertext, {found.format} metadata"
        verdict.layers.append(
            Layer(HOST_CACHE, "holds ciphertext" if not found.other else None, detail=detail)
        )
        verdict.expect(
            not found.other, f"the host cache holds data other than ciphertext in {found.other} sectors"
        )

    def _pid(self, verdict: DiskVerdict, disk: Disk, name: str) -> int | None:
        pid = Process(self._config.stage_directory / str(disk.id) / name).pid()
        verdict.expect(bool(pid), f"the process of the {_NAMES[name]} is not visible")
        return pid or None


def _process(pid: int | None) -> str:
    return f"process {pid}" if pid else ""


def _luks_offset(descriptor: int) -> int:
    """Offset of a qcow2 image's LUKS header in bytes; 0 if the cached data does not show the offset."""
    try:
        area = Qcow2Header.read(descriptor).luks
    except ImageFormatError:
        return 0
    return area[0] if area else 0

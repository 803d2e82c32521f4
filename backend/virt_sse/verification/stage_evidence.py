"""Verifies stage processes: their sockets, open files, command lines, block graphs and cached content.

The checks are the same for every kind of process; a kind states its facts as :class:`ExpectedEvidence
<virt_sse.stages.stage_process.ExpectedEvidence>`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from virt_sse.errors import ImageFormatError, StageError, VirtSseError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.layers import LayerPlan, Stage
from virt_sse.qemu.qcow2 import Qcow2Header
from virt_sse.qemu.storage_daemon import (
    BASE_FILE_NODE,
    BASE_NODE,
    EXPORTED_NODE,
    FILE_NODE,
    VOLUME_NODE,
    StorageDaemon,
    volume_nodes,
)
from virt_sse.stages import Stages
from virt_sse.stages.kinds import guest_and_below
from virt_sse.stages.stage_process import ExportSource, ImageSource, StageProcess
from virt_sse.system.rbd_names import is_rbd
from virt_sse.system.running_process import command_line
from virt_sse.verification.chains import LinkKind
from virt_sse.verification.graph import BlockGraph
from virt_sse.verification.isolation import check_isolation
from virt_sse.verification.processes import OpenFile, has_open, listens_at, open_files
from virt_sse.verification.sector_sample import sample_sectors
from virt_sse.verification.verdict import DataPlace, DiskVerdict, Layer


class StageEvidence:
    """Verifies the stage processes of running domains' disks."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages

    def check(
        self, verdict: DiskVerdict, disk: Disk, plan: LayerPlan, vm_id: UUID, *, base: Disk | None = None
    ) -> None:
        """Check a running domain's disk: exactly the processes of *plan* run, and work as expected.

        :param base: the image below a linked clone.
        """
        guest, wanted = guest_and_below(plan, self._stages.kinds)
        try:
            record = self._stages.record(disk.id)
        except StageError as exc:
            verdict.expect(False, str(exc))
            return
        if record is None:
            verdict.expect(not wanted, "nothing runs between the guest's QEMU and the image")
            return
        verdict.expect(record.domain_id == vm_id, f"the stage processes belong to domain {record.domain!r}")
        self._compare(verdict, record.stages, wanted)
        processes = self._stages.processes(record)
        gate = self._stages.gate(record)
        verdict.expect(bool(gate or guest), "no gate stands between the guest's QEMU and the plaintext")
        if gate and processes[0].process.pid():  # the gate ends with the process
            pid = gate.process.pid()
            if verdict.expect(pid is not None, "the gate of the disk's socket does not run") and pid:
                path = gate.guest.path
                verdict.expect(listens_at(pid, path), f"another process than the gate listens at {path}")
        for process in processes:
            pid = process.process.pid()
            if verdict.expect(pid is not None, f"the {process.title} does not run"):
                verdict.expect(bool(pid), f"the {process.title} cannot be seen from here")
                _check_process(verdict, disk, process, pid or None, base)
                if pid and record.users:  # else started by an earlier version
                    check_isolation(verdict, process, pid)

    def check_ended(self, verdict: DiskVerdict, disk: Disk, vm_id: UUID) -> bool:
        """Check a stopped domain's disk; whether stage processes may still use the image."""
        try:
            record = self._stages.record(disk.id)
        except StageError as exc:
            verdict.expect(False, str(exc))
            return True
        is_used = record is not None and record.domain_id == vm_id
        verdict.expect(not is_used, "the stage processes have not been ended")
        return is_used

    def _compare(self, verdict: DiskVerdict, started: Sequence[Stage], wanted: Sequence[Stage]) -> None:
        """Compare the stages of the running processes with the plan's."""
        for kind in self._stages.kinds:
            have, want = (
                [stage for stage in stages if isinstance(stage, kind.stage_type)]
                for stages in (started, wanted)
            )
            if have and want:
                problem = f"for {kind.to_record(have)}, {kind.to_record(want)} was asked for"
                verdict.expect(have == want, f"the {kind.title} was started {problem}")
            else:
                verdict.expect(not have, f"there is a {kind.title}, and none was asked for")
                verdict.expect(not want, f"there is no {kind.title}")


def _check_process(
    verdict: DiskVerdict, disk: Disk, process: StageProcess[Any], pid: int | None, base: Disk | None
) -> None:
    """Check a running process.

    :param pid: ``None`` if the process is in another PID namespace.
    :param base: the image below a linked clone.
    """
    expected = process.evidence()
    is_seen = pid is not None
    if expected.monitor:
        is_seen = _check_volumes(verdict, disk, process, expected.monitor, pid, base)
    if pid:
        socket = process.place.served.path
        verdict.expect(
            listens_at(pid, socket), f"another process than the {process.title} listens at {socket}"
        )
        if is_rbd(disk.path):
            pass  # no file: the block graph names the image
        elif isinstance(process.place.source, ImageSource):
            verdict.expect(
                has_open(pid, disk.path),
                f"the {process.title} has another file open than {disk.path}: it was replaced",
            )
            if base:
                verdict.expect(
                    has_open(pid, base.path),
                    f"the {process.title} has another file open than {base.path}: it was replaced",
                )
        else:
            verdict.expect(
                not has_open(pid, disk.path), f"the {process.title} has the image {disk.path} itself open"
            )
        arguments = command_line(pid)
        for argument, problem in expected.arguments.items():
            verdict.expect(argument in arguments, problem)
        if expected.unnamed_files:
            _check_files(verdict, disk, process, expected.unnamed_files, pid)
    if is_seen:
        verdict.places.append(DataPlace(expected.data, expected.is_plaintext))


def _check_volumes(
    verdict: DiskVerdict,
    disk: Disk,
    process: StageProcess[Any],
    monitor: StorageDaemon,
    pid: int | None,
    base: Disk | None,
) -> bool:
    """Check the block graph of a QEMU process; whether its monitor answers."""
    title = process.title
    try:
        nodes, edges, exports = monitor.block_graph()
        graph = BlockGraph(nodes, edges, exports=exports)
    except VirtSseError as exc:
        return verdict.expect(False, f"the {title} does not report its block graph: {exc}")
    below = [vertex for vertex in graph.stored() if base and vertex.name == BASE_FILE_NODE]
    own = [vertex for vertex in graph.stored() if vertex not in below]
    stacks = [stack for vertex in own for stack in graph.volumes_over(vertex)]
    volumes = stacks[0][::-1] if stacks else ()
    verdict.expect(len(stacks) < 2, f"the {title} has {len(stacks)} uses of its data instead of 1")
    count = len(process.slots)
    is_complete = len(volumes) == count
    verdict.expect(is_complete, f"the {title} has {len(volumes)} layers instead of {count}")
    for number, slot in enumerate(process.slots):
        cipher = volumes[number].cipher if is_complete else None
        entry = next((entry for entry in disk.deks if entry.slot == slot), None)
        if verdict.expect(entry is not None, f"the disk has no DEK in slot {slot!r}") and entry:
            verdict.layers.append(Layer(title, cipher, entry.slot, str(entry.wrapped.key), _process(pid)))
            is_right = cipher == str(entry.cipher)
            verdict.expect(is_right, f"the {title} encrypts with {cipher}, not {entry.cipher}")
    known = {FILE_NODE, EXPORTED_NODE, *volume_nodes(count)}
    if base:
        known |= {BASE_FILE_NODE, *volume_nodes(len(base.deks), BASE_NODE)}
        _check_base(verdict, base, title, graph, nodes)
    more = sorted({str(node["node-name"]) for node in nodes} - known)
    verdict.expect(not more, f"the {title} has other block nodes, too: {', '.join(more)}")
    exported = [str(each["node-name"]) for each in exports]
    innermost = volumes[0].name if volumes else VOLUME_NODE
    is_right = exported == [innermost]  # of a daemon started by an earlier version
    if volumes and exported == [EXPORTED_NODE]:
        is_right = EXPORTED_NODE in graph.plaintext_nodes(volumes[0])
    verdict.expect(is_right, f"the {title} exports {', '.join(exported) or 'nothing'}")
    source = process.place.source
    wanted = disk.path if isinstance(source, ImageSource) else source.socket
    for vertex in own:
        place = vertex.place.path if vertex.place else None
        verdict.expect(place == wanted, f"the {title} has its data in {place}")
    return True


def _check_base(
    verdict: DiskVerdict, base: Disk, title: str, graph: BlockGraph, nodes: Sequence[Mapping[str, Any]]
) -> None:
    """Check that the image below a linked clone is open once, read-only, with all of its layers."""
    stored = [vertex for vertex in graph.stored() if vertex.name == BASE_FILE_NODE]
    places = [vertex.place.path if vertex.place else None for vertex in stored]
    verdict.expect(
        places == [base.path],
        f"the {title} has the image below in {', '.join(map(str, places)) or 'no file'}",
    )
    stacks = [stack for vertex in stored for stack in graph.volumes_over(vertex)]
    ciphers = [volume.cipher for volume in stacks[0][::-1]] if len(stacks) == 1 else []
    wanted = [str(entry.cipher) for entry in base.deks]
    verdict.expect(ciphers == wanted, f"the {title} decrypts the image below with {ciphers}, not {wanted}")
    exposed = [
        (exposure.kind, exposure.place)
        for vertex in graph.stored()
        if vertex.name == FILE_NODE
        for stack in graph.volumes_over(vertex)
        for exposure in graph.exposures(stack[-1])
    ]
    is_below = exposed == [(LinkKind.BACKING, str(base.path))]
    verdict.expect(is_below, f"the {title} does not have the image {base.name!r} alone below the disk")
    names = {BASE_FILE_NODE, *volume_nodes(len(base.deks), BASE_NODE)}
    written = [str(node["node-name"]) for node in nodes if node["node-name"] in names and not node["ro"]]
    verdict.expect(not written, f"the {title} can write to the image below: {', '.join(written)}")


def _check_files(
    verdict: DiskVerdict, disk: Disk, process: StageProcess[Any], folder: Path, pid: int
) -> None:
    title = process.title
    found = [file for file in open_files(pid) if Path(file.name).is_relative_to(folder)]
    verdict.expect(bool(found), f"the {title} has no file in {folder}")
    for file in found:
        verdict.expect(file.is_unnamed, f"the {title}'s file {file.name} has a name")
        has_holes = disk.format is DiskFormat.RAW and isinstance(process.place.source, ExportSource)
        _check_content(verdict, disk, title, file, pid, has_holes=has_holes)


def _check_content(
    verdict: DiskVerdict, disk: Disk, title: str, file: OpenFile, pid: int, *, has_holes: bool
) -> None:
    """Check a sample of an unnamed file.

    :param has_holes: whether the file caches a volume in a raw image; the volume decrypts holes, too.
    """
    try:
        descriptor = os.open(f"/proc/{pid}/fd/{file.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            is_qcow2 = disk.format is DiskFormat.QCOW2
            headers = {0, _luks_offset(descriptor) if is_qcow2 else 0}
            seen = sample_sectors(descriptor, headers, has_tables=is_qcow2, has_holes=has_holes)
        finally:
            os.close(descriptor)
    except OSError as exc:
        verdict.expect(False, f"the {title}'s file cannot be read: {exc.strerror}")
        return
    detail = f"{_process(pid)}; sectors sampled: {seen.ciphertext} ciphertext, {seen.format} metadata"
    verdict.layers.append(Layer(title, "holds ciphertext" if not seen.other else None, detail=detail))
    verdict.expect(not seen.other, f"the {title} holds data that is not ciphertext, in {seen.other} sectors")


def _process(pid: int | None) -> str:
    return f"process {pid}" if pid else ""


def _luks_offset(descriptor: int) -> int:
    """Offset of a qcow2 image's LUKS header, as far as the cache has the qcow2 header; else 0."""
    try:
        area = Qcow2Header.read(descriptor).luks
    except ImageFormatError:
        return 0
    return area[0] if area else 0

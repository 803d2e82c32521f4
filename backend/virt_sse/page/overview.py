"""Collects what the page shows, in the agent: from the store, the audit log, libvirt and the agent's watch.

Each part is read on its own: a part that cannot be read is a fault in the document, and hides no other part.
"""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditEntry
from virt_sse.errors import VirtSseError
from virt_sse.host.doctor import examine_set_up
from virt_sse.keys.host import Host
from virt_sse.model.disks import Disk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import GuestNode, HostCache, LayerPlan, StorageNode
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.page.document import (
    DiskPart,
    EffectPart,
    FaultPart,
    HostPart,
    JobPart,
    KeyStatePart,
    LayerPart,
    Overview,
    SetPart,
    UsePart,
    WatchedDomainPart,
)
from virt_sse.page.survey import DomainSurvey, Survey

_TAIL = 200
"""Records of the audit log that the page shows."""
_MOST_RECORDS = 5000
"""Records read for the last use of each key."""
_SURVEY_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class AgentView:
    """What the agent knows, for the page.

    :ivar status: the agent's view of running domains and keys, as of ``GET /status``.
    :ivar plan: the layers and stages of a disk.
    :ivar enforcement: action and grace time in seconds for a running domain, if the key of these of its disks
        is revoked; each disk with its encryption set.
    """

    status: Callable[[], Mapping[str, Any]]
    plan: Callable[[Disk], LayerPlan]
    enforcement: Callable[[Sequence[tuple[Disk, EncryptionSet | None]]], tuple[str, int]]


class KeyUses:
    """The newest records of the audit log. Each call reads the records since the last call."""

    def __init__(self, log: AuditLog) -> None:
        self._log = log
        self._tail: list[AuditEntry] = []
        self._last: dict[tuple[str, str], AuditEntry] = {}
        self.records_read = 0

    def update(self) -> None:
        """Read the new records.

        :raise AuditError: When the log cannot be read.
        """
        newest = next(iter(self._log.tail(1)), None)
        if newest is None:
            self._tail, self._last, self.records_read = [], {}, 0
            return
        seen = self._tail[-1].seq if self._tail else 0
        if newest.seq < seen:  # another log
            self._tail, self._last, self.records_read, seen = [], {}, 0, 0
        new = [each for each in self._log.tail(min(newest.seq - seen, _MOST_RECORDS)) if each.seq > seen]
        for entry in new:
            key, version = entry.document["key"] or "", entry.document["key-version"] or ""
            self._last[key, version] = entry
        self.records_read += len(new)
        self._tail = [*self._tail, *new][-_TAIL:]

    def tail(self) -> tuple[UsePart, ...]:
        """The newest records, oldest first."""
        return tuple(map(_use, self._tail))

    def last(self) -> tuple[UsePart, ...]:
        """The newest record of each key version."""
        return tuple(map(_use, self._last.values()))


class OverviewCollector:
    """Collects the document. For one thread at a time."""

    def __init__(self, host: Host, view: AgentView) -> None:
        self._host = host
        self._view = view
        self._survey = DomainSurvey(host.config.libvirt_uri)
        self._uses = KeyUses(AuditLog.of_host(host.config))

    def collect(self) -> Overview:
        """The document as of now. Raises no expected error."""
        faults: list[FaultPart] = []
        survey = self._survey.current(_SURVEY_SECONDS)
        faults += survey.faults
        disks: list[Disk] = []
        sets: list[EncryptionSet] = []
        copies: list[Replacement] = []
        with _noting(faults, "store"):
            disks = self._host.store_reads.all()
            sets = self._host.store.encryption_sets.all()
            copies = self._host.store.replacements.all()
        with _noting(faults, "audit log"):
            self._uses.update()
        found = examine_set_up(self._host, disks)
        faults += (FaultPart(part=e.part, problem=e.problem, remedy=e.remedy) for e in found)
        status = self._view.status()
        by_id = {each.id: each for each in sets}
        return Overview(
            time=datetime.now(UTC),
            host=_host_part(status, survey),
            disks=tuple(self._disk(disk, by_id) for disk in disks),
            domains=survey.domains,
            watched=tuple(_watched(each) for each in status["domains"]),
            sets=tuple(map(_set_part, sets)),
            key_states=tuple(_key_states(status["keys"])),
            effects=tuple(self._effects(survey, disks, by_id)),
            jobs=tuple(_jobs(disks, copies, survey)),
            uses=self._uses.tail(),
            last_uses=self._uses.last(),
            records_read=self._uses.records_read,
            faults=tuple(faults),
        )

    def _disk(self, disk: Disk, sets: Mapping[UUID, EncryptionSet]) -> DiskPart:
        layers: tuple[LayerPart, ...] = ()
        problem = None
        try:
            layers = tuple(_layers(disk, self._view.plan(disk))) if disk.deks else ()
        except VirtSseError as exc:
            problem = str(exc)
        encryption_set = sets.get(disk.set_id) if disk.set_id else None
        return DiskPart(
            id=disk.id,
            name=disk.name,
            kind=disk.kind.value,
            state=disk.state.value,
            size=disk.size,
            format=disk.format.value,
            path=str(disk.path),
            sku=disk.sku.value,
            encryption_type=disk.encryption_type.value,
            encryption_set=encryption_set.name if encryption_set else None,
            caching=disk.caching.value,
            created=disk.created,
            deleted=disk.deleted,
            scheduled_purge=disk.scheduled_purge,
            generation=disk.generation,
            layers=layers,
            problem=problem,
        )

    def _effects(
        self, survey: Survey, disks: Iterable[Disk], sets: Mapping[UUID, EncryptionSet]
    ) -> Iterator[EffectPart]:
        """What would happen to each running domain, key by key."""
        by_id = {disk.id: disk for disk in disks}
        for domain in survey.domains:
            if domain.state == "off":
                continue
            of_key: dict[KeyRef, list[tuple[Disk, EncryptionSet | None]]] = defaultdict(list)
            for use in domain.disks:
                if use.disk_id and (disk := by_id.get(use.disk_id)):
                    pair = (disk, sets.get(disk.set_id) if disk.set_id else None)
                    for key in {KeyRef(e.wrapped.key.provider, e.wrapped.key.name) for e in disk.deks}:
                        of_key[key].append(pair)
            for key, pairs in of_key.items():
                action, grace = self._view.enforcement(pairs)
                yield EffectPart(key=str(key), domain_id=domain.id, action=action, grace_seconds=grace)


@contextlib.contextmanager
def _noting(faults: list[FaultPart], part: str) -> Iterator[None]:
    try:
        yield
    except VirtSseError as exc:
        faults.append(FaultPart(part=part, problem=str(exc), remedy=exc.hint))


def _layers(disk: Disk, plan: LayerPlan) -> Iterator[LayerPart]:
    for stage in plan.stages:
        if isinstance(stage, HostCache):
            yield LayerPart(process="cache", detail=stage.caching.value)
        elif isinstance(stage, GuestNode | StorageNode):
            entry = disk.dek(stage.slot)
            key = entry.wrapped.key
            yield LayerPart(
                process="guest" if isinstance(stage, GuestNode) else "storage",
                cipher=str(entry.cipher),
                slot=entry.slot,
                key=str(KeyRef(key.provider, key.name)),
                version=key.version,
            )


def _jobs(disks: Iterable[Disk], copies: Iterable[Replacement], survey: Survey) -> Iterator[JobPart]:
    """Copies on record, with their block jobs' progress; disks being made or deleted; other block jobs."""
    block_jobs = {(job.domain_id, job.target): job.shown for job in survey.jobs}
    new = set()
    for copy in copies:
        new |= {copy.disk_id, copy.source_id}
        if copy.state is ReplacementState.KEPT:
            continue
        what = "re-encryption" if copy.source_id else "encryption in place"
        where = f"online, as {copy.target}" if copy.domain_id and copy.target else "offline"
        state = "cancelled" if copy.is_cancelled else copy.state.value
        job = block_jobs.pop((copy.domain_id, copy.target), None) if copy.domain_id else None
        fraction = job.fraction if job else None
        yield JobPart(kind=what, subject=copy.name, detail=f"{state}, {where}", fraction=fraction)
    for disk in disks:
        if not disk.state.is_at_rest and disk.id not in new:
            kind = f"{disk.kind.title}: {disk.state.value}"
            yield JobPart(kind=kind, subject=disk.name, detail=str(disk.path))
    yield from block_jobs.values()


def _host_part(status: Mapping[str, Any], survey: Survey) -> HostPart:
    return HostPart(
        name=os.uname().nodename,
        version=str(status["version"]),
        began=str(status["began"]),
        libvirt=str(status["libvirt"]),
        libvirt_connected=bool(status["libvirt-connected"]),
        last_look=status["last-look"],
        poll_seconds=float(status["poll-seconds"]),
        surveyed=survey.time,
    )


def _watched(domain: Mapping[str, Any]) -> WatchedDomainPart:
    return WatchedDomainPart(
        name=str(domain["name"]),
        revoked=domain["revoked"],
        paused=bool(domain["paused"]),
        plaintext=tuple(domain["plaintext"]),
    )


def _key_states(keys: Iterable[Mapping[str, Any]]) -> Iterator[KeyStatePart]:
    for each in keys:
        key, _, version = str(each["key"]).rpartition(":")  # a version holds no colon
        yield KeyStatePart(key=key, version=version, state=str(each["state"]))


def _set_part(encryption_set: EncryptionSet) -> SetPart:
    return SetPart(
        id=encryption_set.id,
        name=encryption_set.name,
        key=str(encryption_set.key),
        version=encryption_set.key_version,
        automatic_rotation=encryption_set.automatic_rotation,
        action=encryption_set.revocation.value,
        grace_seconds=encryption_set.grace_seconds,
    )


def _use(entry: AuditEntry) -> UsePart:
    text = entry.document
    return UsePart(
        seq=entry.seq,
        time=text["time"] or "",
        component=text["component"] or "",
        actor=text["actor"] or "",
        action=text["action"] or "",
        key=text["key"] or "",
        version=text["key-version"],
        disk=text["disk"],
        slot=text["slot"],
        domain=text["domain"],
        result=text["result"] or "",
        reason=text["reason"],
    )

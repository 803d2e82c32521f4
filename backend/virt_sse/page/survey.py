"""The domains of libvirt, running or not, for the page; read in a separate thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

import libvirt

from virt_sse.errors import VirtSseError
from virt_sse.libvirt import domains
from virt_sse.libvirt.block_copy import BlockCopy
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.page.document import DomainDiskPart, DomainPart, FaultPart, JobPart

_SHORTEST_SECONDS = 2.0
_SHARE = 20
"""A survey takes at most one part in twenty of the time."""


@dataclass(frozen=True, slots=True)
class BlockJob:
    """A block copy or backup of a running domain's disk.

    :ivar target: the disk's name in the guest.
    """

    domain_id: UUID
    target: str
    shown: JobPart


@dataclass(frozen=True, slots=True)
class Survey:
    """The domains at a point in time.

    :ivar jobs: block copies and backups of running domains.
    :ivar faults: parts that could not be read.
    """

    time: datetime | None = None
    domains: tuple[DomainPart, ...] = ()
    jobs: tuple[BlockJob, ...] = ()
    faults: tuple[FaultPart, ...] = ()


class DomainSurvey:
    """Surveys the domains on demand.

    In a separate thread: libvirt answers no listing while the hook of any domain runs.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._last = Survey()
        self._next = 0.0
        self._thread: threading.Thread | None = None

    def current(self, patience: float) -> Survey:
        """The newest survey; a new one is begun if due.

        :param patience: how long to wait for the new survey, in seconds; then the last one is returned.
        """
        if self._thread is None and time.monotonic() >= self._next:
            # A daemon: a libvirt that hangs must not keep the agent from its end.
            self._thread = threading.Thread(target=self._take, name="page-survey", daemon=True)
            self._thread.start()
        if self._thread is not None:
            self._thread.join(patience)
            if not self._thread.is_alive():
                self._thread = None
        return self._last

    def _take(self) -> None:
        began = time.monotonic()
        try:
            with connected(self._uri) as connection:
                survey = _survey(connection)
        except VirtSseError as exc:
            fault = FaultPart(part="libvirt", problem=str(exc), remedy=exc.hint)
            survey = Survey(self._last.time, self._last.domains, (), (fault,))
        now = time.monotonic()
        self._next = now + max(_SHORTEST_SECONDS, _SHARE * (now - began))
        self._last = survey


def _survey(connection: libvirt.virConnect) -> Survey:
    found: list[DomainPart] = []
    jobs: list[BlockJob] = []
    faults: list[FaultPart] = []
    for domain in connection.listAllDomains():
        name = str(domain.name())
        try:
            is_active = bool(domain.isActive())
            definition = DomainDefinition.salvage(
                domain.XMLDesc(0 if is_active else libvirt.VIR_DOMAIN_XML_INACTIVE)
            )
            backup = domains.salvaged_backup(domain)[0] if is_active else None
            chains = definition.disk_chains(backup)
            found.append(_domain(domain, definition, chains, is_active=is_active))
            jobs += _jobs(domain, name, chains) if is_active else ()
        except VirtSseError as exc:
            faults.append(FaultPart(part=f"domain {name}", problem=str(exc), remedy=exc.hint))
        except libvirt.libvirtError as exc:
            if not connection.isAlive():
                raise
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                faults.append(FaultPart(part=f"domain {name}", problem=str(exc)))
    found.sort(key=lambda each: each.name)
    return Survey(datetime.now(UTC), tuple(found), tuple(jobs), tuple(faults))


def _domain(
    domain: libvirt.virDomain, definition: DomainDefinition, chains: list[DiskChain], *, is_active: bool
) -> DomainPart:
    is_paused = is_active and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED
    return DomainPart(
        id=UUID(bytes=domain.UUID()),
        name=str(domain.name()),
        state="paused" if is_paused else "running" if is_active else "off",
        encryption_at_host=definition.has_encryption_at_host,
        disks=tuple(
            DomainDiskPart(
                target=chain.target,
                place=chain.links[0].place,
                disk_id=chain.disk_id,
                is_encrypted=chain.disk_id is not None or chain.links[0].is_encrypted,
                read_only=chain.read_only,
            )
            for chain in chains
        ),
    )


def _jobs(domain: libvirt.virDomain, name: str, chains: list[DiskChain]) -> Iterator[BlockJob]:
    for chain in chains:
        if chain.mirror or chain.backup:
            try:
                progress = BlockCopy(domain, chain.target).progress()
            except libvirt.libvirtError:  # the job or the domain has just ended
                progress = None
            kind = f"block job {chain.mirror_job or 'copy'}" if chain.mirror else "backup"
            places = ", ".join(link.place for link in (*chain.mirror, *chain.backup))
            fraction = progress.fraction if progress and progress.end else None
            shown = JobPart(
                kind=kind, subject=f"{chain.target} of {name}", detail=f"to {places}", fraction=fraction
            )
            yield BlockJob(UUID(bytes=domain.UUID()), chain.target, shown)

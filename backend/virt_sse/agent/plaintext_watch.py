"""Finds plaintext images with data of encrypted disks, and applies the site's policy: warn, pause or commit.

libvirt creates such images: a snapshot's overlay, or the target of a block copy or backup, if the XML or the
command names no encryption. An image of a disk, attached without its key, gets a guest's plaintext, too. The
agent finds the images in libvirt's live XML of the domain and its backup.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

from virt_sse.agent import enforcement
from virt_sse.agent.inventory import PLAINTEXT_NAMESPACE, InventorySnapshot, RunningDomain
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.overlay_commit import CommitUnclearError, OverlayCommit, committable
from virt_sse.agent.overlay_commit_record import OverlayCommitRecord, record_path
from virt_sse.backend import Backend
from virt_sse.config.file import PlaintextPolicy
from virt_sse.errors import AgentError, InvalidValueError, VirtSseError
from virt_sse.verification.chains import LinkKind, PlaintextLink, plaintext_links

_log = logging.getLogger(__name__)

_THREADS = 4
_AGAIN_SECONDS = 10.0

Run = tuple[UUID, int]
"""A domain's UUID, and the number of its run."""


class PlaintextWatch:
    """Keeps its findings in memory, to report each once; only the records of commits are on disk."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._uri = backend.host.config.libvirt_uri
        self._policy = backend.host.config.agent.plaintext
        self._folder: Path = backend.host.config.state_directory / "folds"
        self._guest_socket = backend.host.stages.guest_socket
        self._metrics = metrics
        self._seen = 0
        self._links: Mapping[Run, tuple[PlaintextLink, ...]] = {}
        self._serials: frozenset[str] = frozenset()
        self._by_serial: dict[str, UUID] = {}
        self._jobs: dict[UUID, Future[None]] = {}
        self._not_before: dict[UUID, float] = {}
        self._complaints: dict[UUID, str] = {}
        self._damaged: frozenset[str] = frozenset()
        self._stopping = threading.Event()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="plaintext")

    def keep(self, snapshot: InventorySnapshot, revoked: Collection[UUID]) -> None:
        """Check the running domains, once for each snapshot, and start the policy's actions.

        :param revoked: domains whose key is revoked: not resumed.
        """
        if snapshot.number == self._seen:
            return
        self._seen = snapshot.number
        domains = {(each.uuid, each.run): each for each in (*snapshot.domains, *snapshot.others)}
        known = self._known(domains.values())
        found = {run: links for run, each in domains.items() if (links := self._found(each, known))}
        self._report(found, domains)
        self._links = found
        self._metrics.plaintext_links.set(sum(map(len, found.values())))
        for run, domain in domains.items():
            if run in found and self._policy is PlaintextPolicy.PAUSE:
                if domain.runs:
                    self._do(domain.uuid, self._pause, domain)
            elif domain.paused_for_plaintext and domain.uuid not in revoked:
                self._do(domain.uuid, self._resume, domain)
        self._commit(found, domains)

    def links(self, domain: RunningDomain) -> list[str]:
        """Descriptions of the unencrypted images found in a domain."""
        return [str(link) for link in self._links.get((domain.uuid, domain.run), ())]

    def stop(self) -> None:
        """Start nothing more. The next agent continues commits under way."""
        self._stopping.set()
        self._pool.shutdown(cancel_futures=True)

    def _known(self, domains: Iterable[RunningDomain]) -> Mapping[str, UUID]:
        """The store's disks by serial number; empty unless a domain has disks known by serial number only."""
        serials = frozenset(serial for domain in domains for serial in _strange_serials(domain))
        if serials != self._serials:
            self._serials = serials
            disks = self._backend.disks.all() if serials else []
            self._by_serial = {disk.guest_serial: disk.id for disk in disks}
        return self._by_serial

    def _found(self, domain: RunningDomain, known: Mapping[str, UUID]) -> tuple[PlaintextLink, ...]:
        try:
            links = plaintext_links(
                domain.definition, domain.backup, known=known, guest_socket=self._guest_socket
            )
        except InvalidValueError:  # logged by the inventory
            return ()
        return tuple(dict.fromkeys([*links, *self._keyless(domain)]))

    def _keyless(self, domain: RunningDomain) -> list[PlaintextLink]:
        """Images of disks of ours that the domain has without encryption."""
        if not domain.plain_files:
            return []
        paths = self._backend.host.image_paths.among(domain.plain_files)
        return [
            PlaintextLink(disk.id, domain.plain_files[disk.path], LinkKind.KEYLESS, str(disk.path))
            for disk in self._backend.host.store.at_paths(paths)
        ]

    def _report(
        self,
        found: Mapping[Run, tuple[PlaintextLink, ...]],
        domains: Mapping[Run, RunningDomain],
    ) -> None:
        for run, links in found.items():
            for link in links:
                if link not in self._links.get(run, ()):
                    self._metrics.plaintext_links_found.labels(link.kind.value).inc()
                    details = _details(domains[run], link) | {"policy": self._policy.value}
                    _log.warning("plaintext-link", extra=fields(details))
        for run, links in self._links.items():
            for link in links:
                if link not in found.get(run, ()) and run in domains:
                    _log.info("plaintext-link-gone", extra=fields(_details(domains[run], link)))

    def _commit(
        self,
        found: Mapping[Run, tuple[PlaintextLink, ...]],
        domains: Mapping[Run, RunningDomain],
    ) -> None:
        """Start commits, one at a time in each domain; recorded commits first."""
        damaged: dict[Path, AgentError] = {}
        if self._policy is PlaintextPolicy.COMMIT or self._folder.is_dir():
            for record in OverlayCommitRecord.read_all(self._folder, damaged.__setitem__):
                if self._policy is PlaintextPolicy.COMMIT or record.is_committed:
                    self._do(record.domain_id, self._run_commit, record.domain_id, record.target, record)
        self._report_damaged(damaged.values())
        if self._policy is PlaintextPolicy.COMMIT:
            for run, links in found.items():
                targets = {link.target for link in links if link.kind is LinkKind.OVERLAY}
                for chain in domains[run].definition.disk_chains() if targets else ():
                    is_blocked = record_path(self._folder, run[0], chain.target) in damaged
                    if chain.target in targets and committable(chain) and not is_blocked:
                        self._do(run[0], self._run_commit, run[0], chain.target, None)

    def _report_damaged(self, errors: Collection[AgentError]) -> None:
        """Log damaged records, each once; a new commit must not replace such a record."""
        messages = frozenset(map(str, errors))
        for message in messages - self._damaged:
            _log.error("fold-record-damaged", extra=fields({"reason": message}))
        self._damaged = messages

    def _do(self, domain_id: UUID, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in a worker thread, unless the domain has work under way or a recent failure."""
        job = self._jobs.get(domain_id)
        if (job is None or job.done()) and time.monotonic() >= self._not_before.get(domain_id, 0.0):
            self._jobs[domain_id] = self._pool.submit(function, *arguments)

    def _pause(self, domain: RunningDomain) -> None:
        self._act("pause", domain)

    def _resume(self, domain: RunningDomain) -> None:
        self._act("resume", domain)

    def _act(self, action: str, domain: RunningDomain) -> None:
        details = {"domain": domain.name, "action": action, "for": "plaintext"}
        act = enforcement.pause if action == "pause" else enforcement.resume
        try:
            done = act(self._uri, domain, PLAINTEXT_NAMESPACE)
        except VirtSseError as exc:
            self._metrics.failed_actions.labels(action).inc()
            _log.warning("domain-action-failed", extra=fields(details | {"reason": str(exc)}))
            return
        if done:
            self._metrics.actions.labels(action).inc()
            _log.warning("domain-action", extra=fields(details))

    def _run_commit(self, domain_id: UUID, target: str, record: OverlayCommitRecord | None) -> None:
        details: dict[str, object] = {"domain-id": domain_id, "target": target}
        try:
            if OverlayCommit(self._uri, self._folder, domain_id, target, self._stopping).run(record):
                self._metrics.actions.labels("fold").inc()
            else:
                self._not_before[domain_id] = time.monotonic() + _AGAIN_SECONDS
            self._complaints.pop(domain_id, None)
        except VirtSseError as exc:
            self._not_before[domain_id] = time.monotonic() + _AGAIN_SECONDS
            unclear = isinstance(exc, CommitUnclearError) and record is not None
            if unclear and record and not any(each.path.exists() for each in record.overlays):
                record.remove(self._folder)  # an administrator has removed the overlays
                return
            if self._complaints.get(domain_id) != str(exc):
                self._complaints[domain_id] = str(exc)
                self._metrics.failed_actions.labels("fold").inc()
                details["reason"] = str(exc)
                if unclear and record:
                    details["not-wiped"] = [str(each.path) for each in record.overlays]
                _log.warning("fold-unclear" if unclear else "fold-failed", extra=fields(details))


def _strange_serials(domain: RunningDomain) -> list[str]:
    """Serials of disks without the store's encryption in libvirt's XML."""
    try:
        chains = domain.definition.disk_chains()
        return [chain.serial for chain in chains if chain.ours is None and chain.serial]
    except InvalidValueError:
        return []


def _details(domain: RunningDomain, link: PlaintextLink) -> dict[str, object]:
    return {
        "domain": domain.name,
        "disk": link.disk_id,
        "target": link.target,
        "kind": link.kind.value,
        "place": link.place,
    }

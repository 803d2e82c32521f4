"""Commits plaintext overlays of an encrypted disk into the disk, then overwrites and removes the files.

The steps are: write a record of the commit; mark the running domain in its live metadata, which end with the
run; let libvirt commit the overlays and pivot the domain to the disk; update the record; overwrite the
overlays; delete libvirt's metadata of snapshots that need the overlays; remove mark and record. Each step can
be repeated, and an interrupted commit continues from the record. If a domain no longer uses the overlays,
only the mark proves a successful commit: without the mark, nothing is overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.agent.logs import fields
from virt_sse.agent.overlay_commit_record import Overlay, OverlayCommitRecord
from virt_sse.errors import DiskInUseError, ImageError, LibvirtError
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import ChainLink, DiskChain
from virt_sse.libvirt.snapshots import SnapshotFiles
from virt_sse.libvirt.xml import parse_xml
from virt_sse.qemu import image_file
from virt_sse.system.files import canonical
from virt_sse.system.overwrite import overwrite_and_remove
from virt_sse.verification.chains import ACTIVE_COMMIT
from virt_sse.verification.processes import identity

_log = logging.getLogger(__name__)

_NAMESPACE = "https://virt-sse.invalid/agent/fold/{target}/1"
_PREFIX = "virt-sse"
_POLL_SECONDS = 0.1
_LET_GO_SECONDS = 5.0
"""Time for QEMU to close an overlay."""


class CommitUnclearError(LibvirtError):
    """A domain no longer uses overlays whose commit is not proven: the overlays are kept."""


def committable(chain: DiskChain) -> tuple[ChainLink, ...]:
    """The overlays to commit into an encrypted disk: all of them, or none."""
    overlays = chain.links[: chain.ours or 0]
    can_be = all(link.is_file and not link.is_encrypted for link in overlays) and chain.target.isalnum()
    return overlays if can_be else ()


class OverlayCommit:
    """Commits the overlays of a disk of a domain. Waits, and so needs a thread.

    :param folder: folder of the records.
    :param stopping: set to interrupt the commit; the next agent continues from the record.
    """

    def __init__(
        self, uri: str, folder: Path, domain_id: UUID, target: str, stopping: threading.Event
    ) -> None:
        self._uri = uri
        self._folder = folder
        self._domain_id = domain_id
        self._target = target
        self._stopping = stopping

    def run(self, record: OverlayCommitRecord | None) -> bool:
        """Do all remaining steps; whether the commit is complete.

        :param record: the record of a commit to continue.
        :raise CommitUnclearError: When the outcome of the commit to continue is unknown.
        :raise LibvirtError: When libvirt refuses.
        :raise ImageError: When an overlay cannot be overwritten.
        """
        with connected(self._uri) as connection:
            domain = domains.find(connection, self._domain_id)
            if record is None or not record.is_committed:
                record = self._commit(domain, record)
                if record is None:
                    return False
            for overlay in record.overlays:
                self._overwrite(connection, record, overlay)
            if domain is not None:
                _forget_snapshots(domain, record)
                self._mark(domain, None)
        with _written():
            record.remove(self._folder)
        details = {"domain": record.domain, "target": record.target, "disk": record.disk_id}
        _log.info("folded", extra=fields(details))
        return True

    def _commit(
        self, domain: libvirt.virDomain | None, record: OverlayCommitRecord | None
    ) -> OverlayCommitRecord | None:
        """Commit the overlays, and make the domain use the disk alone.

        :return: ``None`` if the commit has to wait for the domain's start or the next agent.
        """
        if domain is None:
            raise CommitUnclearError("the domain no longer exists")
        chain = _chain(domain, self._target)
        overlays = committable(chain) if chain else ()
        if not domain.isActive():
            if not overlays:
                raise CommitUnclearError("the domain has ended, and its definition has no overlay")
            return None
        if chain is None or not overlays:
            if record is None:
                return None
            top = chain.links[0].disk_id if chain else None
            if top != record.disk_id or self._marked(domain) != record.token:
                raise CommitUnclearError("the domain was stopped or got another disk during the commit")
        else:
            record = self._write_record(domain, chain, overlays, record)
            self._mark(domain, record.token)
            if not self._pivot(domain, chain, overlays):
                return None
        record = dataclasses.replace(record, is_committed=True)
        with _written():
            record.write(self._folder)
        return record

    def _write_record(
        self,
        domain: libvirt.virDomain,
        chain: DiskChain,
        overlays: tuple[ChainLink, ...],
        record: OverlayCommitRecord | None,
    ) -> OverlayCommitRecord:
        """Write the record, with the present overlays added to the recorded overlays."""
        recorded = {each.path: each for each in record.overlays} if record else {}
        for link in overlays:
            found = identity(link.path) if link.path else None
            if link.path is None or found is None:
                raise ImageError(f"{link.place} is not a file on this host")
            recorded[link.path] = Overlay(link.path, found)
        disk_id = next(link.disk_id for link in chain.links if link.disk_id)
        token = record.token if record else secrets.token_hex(16)
        made = OverlayCommitRecord(
            self._domain_id, domain.name(), self._target, disk_id, token, tuple(recorded.values())
        )
        with _written():
            made.write(self._folder)
        return made

    def _pivot(self, domain: libvirt.virDomain, chain: DiskChain, overlays: tuple[ChainLink, ...]) -> bool:
        """Let libvirt commit the overlays and pivot the domain to the disk; false if interrupted."""
        if chain.mirror_job != ACTIVE_COMMIT:  # else the commit has begun before
            base = chain.links[len(overlays)]
            name = f"{self._target}[{base.index}]" if base.index else str(base.path)
            domain.blockCommit(self._target, name, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        while not self._stopping.is_set():
            present = _chain(domain, self._target)
            if present is None or present.mirror_job != ACTIVE_COMMIT:
                raise LibvirtError("committing the overlay has failed")
            if present.mirror_ready:
                domain.blockJobAbort(self._target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
                return True
            self._stopping.wait(_POLL_SECONDS)
        return False

    def _overwrite(
        self, connection: libvirt.virConnect, record: OverlayCommitRecord, overlay: Overlay
    ) -> None:
        if not overlay.path.exists():
            return
        for domain in connection.listAllDomains():
            if _uses(domain, overlay.path):
                raise ImageError(f"cannot overwrite {overlay.path}: in use by domain {domain.name()!r}")
        deadline = time.monotonic() + _LET_GO_SECONDS
        while True:
            try:
                image_file.refuse_if_open(overlay.path)
                break
            except DiskInUseError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)
        in_place = overwrite_and_remove(overlay.path, overlay.identity)
        details = {"domain": record.domain, "target": record.target, "path": overlay.path}
        doubt = {} if in_place else {"but": "the storage may keep the old content elsewhere"}
        _log.warning("overlay-wiped", extra=fields(details | doubt))

    def _mark(self, domain: libvirt.virDomain, token: str | None) -> None:
        if domain.isActive():
            element = f"<fold token='{token}'/>" if token else None
            domain.setMetadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                element,
                _PREFIX,
                _NAMESPACE.format(target=self._target),
                libvirt.VIR_DOMAIN_AFFECT_LIVE,
            )

    def _marked(self, domain: libvirt.virDomain) -> str | None:
        try:
            element = domain.metadata(
                libvirt.VIR_DOMAIN_METADATA_ELEMENT,
                _NAMESPACE.format(target=self._target),
                libvirt.VIR_DOMAIN_AFFECT_LIVE,
            )
        except libvirt.libvirtError as exc:
            if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN_METADATA:
                raise
            return None
        return parse_xml(element, kind="domain metadata").get("token")


def _chain(domain: libvirt.virDomain, target: str) -> DiskChain | None:
    chains = domains.definition(domain, inactive=not domain.isActive()).disk_chains()
    return next((chain for chain in chains if chain.target == target), None)


def _uses(domain: libvirt.virDomain, path: Path) -> bool:
    wanted = canonical(path)
    with domains.gone_is_fine():
        definitions = [domains.definition(domain), domains.definition(domain, inactive=True)]
        chains = [chain for definition in definitions for chain in definition.disk_chains()]
        links = [link for chain in chains for link in (*chain.links, *chain.mirror)]
        return any(link.path and canonical(link.path) == wanted for link in links)
    return False


def _forget_snapshots(domain: libvirt.virDomain, record: OverlayCommitRecord) -> None:
    """Delete libvirt's metadata of snapshots that need a removed overlay.

    Such a snapshot cannot be reverted to, and libvirt refuses many operations on a domain with snapshots.
    """
    gone = {overlay.path for overlay in record.overlays}
    for snapshot in domain.listAllSnapshots():
        files = SnapshotFiles.parse(snapshot.getXMLDesc())
        if not files.disks & gone:
            continue
        name = snapshot.getName()
        snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        details = {"domain": record.domain, "snapshot": name}
        if files.has_memory:
            details["memory-stays-in"] = files.memory
        _log.warning("snapshot-forgotten", extra=fields(details))


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ImageError(f"cannot write the record of the overlay commit: {exc}") from exc

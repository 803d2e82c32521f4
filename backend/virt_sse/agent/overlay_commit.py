"""Folds plaintext overlays of an encrypted disk back into the disk, and wipes them.

In this order: what is to be done is noted, in a record; the running domain is marked, in its live metadata,
which ends with its run; libvirt commits the overlays and lets the domain go on with the disk alone; that is
noted; the overlays are wiped; the snapshots in libvirt's books that need them are forgotten; mark and record
are removed. Each step can be done again, and what was cut off goes on from the record. Whether the domain has
let go of the overlays because they were committed is known by the mark alone: without it nothing is wiped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.agent.logs import fields
from virt_sse.agent.overlay_commit_record import FoldRecord, Overlay
from virt_sse.agent.overwrite import wipe
from virt_sse.errors import DiskInUseError, ImageError, LibvirtError
from virt_sse.libvirt.connection import connected
from virt_sse.qemu import img
from virt_sse.system.files import canonical
from virt_sse.verification.chains import ACTIVE_COMMIT, ChainLink, DiskChain, disk_chains
from virt_sse.verification.processes import identity

_log = logging.getLogger(__name__)

_NAMESPACE = "https://virt-sse.invalid/agent/fold/{target}/1"
_PREFIX = "virt-sse"
_POLL_SECONDS = 0.1
_LET_GO_SECONDS = 5.0
"""How long QEMU may take to close an overlay."""


class FoldUnclearError(LibvirtError):
    """A domain has let go of overlays, and it is not known that they were committed: they are not wiped."""


def foldable(chain: DiskChain) -> tuple[ChainLink, ...]:
    """The overlays on top of a disk of ours that can be folded into it: all of them, or none."""
    overlays = chain.links[: chain.ours or 0]
    can_be = all(link.is_file and not link.is_encrypted for link in overlays) and chain.target.isalnum()
    return overlays if can_be else ()


class Fold:
    """Of one disk of one domain. In a thread of its own, since it waits.

    :param folder: of the records.
    :param stopping: set when it is to be left as it is, for the next agent.
    """

    def __init__(
        self, uri: str, folder: Path, domain_id: UUID, target: str, stopping: threading.Event
    ) -> None:
        self._uri = uri
        self._folder = folder
        self._domain_id = domain_id
        self._target = target
        self._stopping = stopping

    def run(self, record: FoldRecord | None) -> bool:
        """Do all that is left to do; whether that is all.

        :param record: of one that has begun.
        :raise FoldUnclearError: When it is not known what became of one that has begun.
        :raise LibvirtError: When libvirt refuses.
        :raise ImageError: When an overlay cannot be wiped.
        """
        with connected(self._uri) as connection:
            domain = _find(connection, self._domain_id)
            if record is None or not record.is_committed:
                record = self._commit(domain, record)
                if record is None:
                    return False
            for overlay in record.overlays:
                self._wipe(connection, record, overlay)
            if domain is not None:
                _forget_snapshots(domain, record)
                self._mark(domain, None)
        with _written():
            record.remove(self._folder)
        told = {"domain": record.domain, "target": record.target, "disk": record.disk_id}
        _log.info("folded", extra=fields(told))
        return True

    def _commit(self, domain: libvirt.virDomain | None, record: FoldRecord | None) -> FoldRecord | None:
        """Bring the domain to where it is on the disk alone; ``None`` when that has to wait for its start, or
        the next agent.
        """
        if domain is None:
            raise FoldUnclearError("the domain is gone")
        chain = _chain(domain, self._target)
        overlays = foldable(chain) if chain else ()
        if not domain.isActive():
            if not overlays:
                raise FoldUnclearError("the domain ended, and is defined without the overlay")
            return None
        if chain is None or not overlays:
            if record is None:
                return None
            top = chain.links[0].disk_id if chain else None
            if top != record.disk_id or self._marked(domain) != record.token:
                raise FoldUnclearError("the domain was stopped, or given another disk, meanwhile")
        else:
            record = self._noted(domain, chain, overlays, record)
            self._mark(domain, record.token)
            if not self._pivot(domain, chain, overlays):
                return None
        record = dataclasses.replace(record, is_committed=True)
        with _written():
            record.write(self._folder)
        return record

    def _noted(
        self,
        domain: libvirt.virDomain,
        chain: DiskChain,
        overlays: tuple[ChainLink, ...],
        record: FoldRecord | None,
    ) -> FoldRecord:
        """The record, with the overlays that there are now beside those that there were."""
        noted = {each.path: each for each in record.overlays} if record else {}
        for link in overlays:
            found = identity(link.path) if link.path else None
            if link.path is None or found is None:
                raise ImageError(f"{link.place} is no file here")
            noted[link.path] = Overlay(link.path, found)
        disk_id = next(link.disk_id for link in chain.links if link.disk_id)
        token = record.token if record else secrets.token_hex(16)
        made = FoldRecord(self._domain_id, domain.name(), self._target, disk_id, token, tuple(noted.values()))
        with _written():
            made.write(self._folder)
        return made

    def _pivot(self, domain: libvirt.virDomain, chain: DiskChain, overlays: tuple[ChainLink, ...]) -> bool:
        """Let libvirt commit the overlays, and the domain let go of them; false when that is cut short."""
        if chain.mirror_job != ACTIVE_COMMIT:  # or it was begun before
            base = chain.links[len(overlays)]
            name = f"{self._target}[{base.index}]" if base.index else str(base.path)
            domain.blockCommit(self._target, name, None, 0, libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE)
        while not self._stopping.is_set():
            present = _chain(domain, self._target)
            if present is None or present.mirror_job != ACTIVE_COMMIT:
                raise LibvirtError("the commit of the overlay has failed")
            if present.mirror_ready:
                domain.blockJobAbort(self._target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
                return True
            self._stopping.wait(_POLL_SECONDS)
        return False

    def _wipe(self, connection: libvirt.virConnect, record: FoldRecord, overlay: Overlay) -> None:
        if not overlay.path.exists():
            return
        for domain in connection.listAllDomains():
            if _uses(domain, overlay.path):
                raise ImageError(f"{overlay.path} is in use by domain {domain.name()!r}, and is not wiped")
        deadline = time.monotonic() + _LET_GO_SECONDS
        while True:
            try:
                img.refuse_if_open(overlay.path)
                break
            except DiskInUseError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_SECONDS)
        in_place = wipe(overlay.path, overlay.identity)
        told = {"domain": record.domain, "target": record.target, "path": overlay.path}
        sure = "" if in_place else "its storage may keep the content elsewhere"
        _log.warning("overlay-wiped", extra=fields(told | ({"but": sure} if sure else {})))

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
        return ET.fromstring(element).get("token")  # noqa: S314 -- from libvirtd, which is trusted


def _find(connection: libvirt.virConnect, domain_id: UUID) -> libvirt.virDomain | None:
    try:
        return connection.lookupByUUID(domain_id.bytes)
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
            raise
        return None


def _chain(domain: libvirt.virDomain, target: str) -> DiskChain | None:
    flags = 0 if domain.isActive() else libvirt.VIR_DOMAIN_XML_INACTIVE
    return next((chain for chain in disk_chains(domain.XMLDesc(flags)) if chain.target == target), None)


def _uses(domain: libvirt.virDomain, path: Path) -> bool:
    wanted = canonical(path)
    try:
        texts = [domain.XMLDesc(0), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)]
    except libvirt.libvirtError as exc:
        if exc.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # gone since it was listed
            raise
        return False
    links = [link for text in texts for chain in disk_chains(text) for link in (*chain.links, *chain.mirror)]
    return any(link.path and canonical(link.path) == wanted for link in links)


def _forget_snapshots(domain: libvirt.virDomain, record: FoldRecord) -> None:
    """Remove from libvirt's books the snapshots that need a file that is gone.

    There is no way back to them, and libvirt refuses much to a domain that has one.
    """
    gone = {overlay.path for overlay in record.overlays}
    for snapshot in domain.listAllSnapshots():
        root = ET.fromstring(snapshot.getXMLDesc())  # noqa: S314 -- from libvirtd, which is trusted
        files = {Path(source.get("file", "")) for source in root.iterfind("./disks/disk/source")}
        if not files & gone:
            continue
        name = snapshot.getName()
        snapshot.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
        told = {"domain": record.domain, "snapshot": name}
        memory = root.find("./memory[@snapshot='external']")
        if memory is not None:
            told["memory-stays-in"] = memory.get("file", "")
        _log.warning("snapshot-forgotten", extra=fields(told))


@contextlib.contextmanager
def _written() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise ImageError(f"cannot note what is being folded: {exc}") from exc

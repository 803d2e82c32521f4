"""Status of running domains' keys: combines the views of libvirt, the store and the key watch."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.key_watch import KeyWatch, ProbeDek, WatchedKey
from virt_sse.agent.logs import fields
from virt_sse.agent.revocation import DomainKeyStatus, RevokedDisk
from virt_sse.backend import Backend
from virt_sse.errors import StoreUnavailableError
from virt_sse.model.disks import Disk
from virt_sse.model.encryption_sets import EncryptionSet

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeyStatusReport:
    """Status of all running domains' keys.

    :ivar probe_deks: all keys in use, each with a DEK to probe the key with.
    """

    domains: Sequence[DomainKeyStatus]
    probe_deks: Mapping[WatchedKey, ProbeDek]


class KeyStatusLookup:
    """Looks up domains' disks in the store, each time again: rotations and moves change the disks' keys."""

    def __init__(self, backend: Backend, keys: KeyWatch) -> None:
        self._backend = backend
        self._keys = keys
        self._unknown: set[UUID] = set()
        self._disks: dict[UUID, Disk] = {}
        self._bases: dict[UUID, Disk] = {}
        self._sets: dict[UUID, EncryptionSet] = {}

    def of(self, snapshot: InventorySnapshot) -> KeyStatusReport:
        """The status of all domains of a snapshot.

        While the store's server does not answer, the last known disks count: an outage of the server does not
        hold up a revocation.

        :raise StoreError: When the store fails for another reason.
        """
        ids = {use.disk_id for domain in snapshot.domains for use in domain.uses}
        try:
            self._look_up(ids)
            self._report_unknown(snapshot, ids - self._disks.keys())
        except StoreUnavailableError as exc:
            _log.warning("store-unavailable", extra=fields({"reason": str(exc)}))
        disks, bases, sets = self._disks, self._bases, self._sets
        probe_deks: dict[WatchedKey, ProbeDek] = {}
        domains = []
        for domain in snapshot.domains:
            revoked: list[RevokedDisk] = []
            is_clear = True
            for use in domain.uses:
                disk = disks.get(use.disk_id)
                if disk is None or use.slot not in (None, *(entry.slot for entry in disk.deks)):
                    is_clear = False
                    continue
                encryption_set = sets.get(disk.set_id) if disk.set_id else None
                base = bases.get(disk.base_id) if disk.base_id else None
                is_clear = is_clear and (base is not None or disk.base_id is None)
                # A layer outside QEMU, and an image below, have DEKs not named in the domain.
                held = [(each, entry) for each in (disk, base) if each for entry in each.deks]
                for each, entry in held:
                    watched = WatchedKey(entry.wrapped.key, each.identity_for(entry.slot))
                    probe_deks.setdefault(watched, ProbeDek(each, entry.slot, domain.name))
                    status = self._keys.status(watched)
                    reason = self._no_identity(encryption_set) if entry is each.deks[0] else None
                    reason = reason or (status.revoked if status else None)
                    if reason:
                        revoked.append(RevokedDisk(disk, encryption_set, reason))
                    is_clear = is_clear and status is not None and status.is_usable
            has_secrets = bool(domain.usages & snapshot.secrets)
            domains.append(DomainKeyStatus(domain, tuple(revoked), is_clear and not revoked, has_secrets))
        return KeyStatusReport(domains, probe_deks)

    def _look_up(self, ids: Collection[UUID]) -> None:
        """Read disks, the images below them, and sets.

        :raise StoreError: When the store cannot be queried.
        """
        disks = {disk.id: disk for disk in self._backend.disks.with_ids(ids)} if ids else {}
        base_ids = {disk.base_id for disk in disks.values() if disk.base_id}
        bases = {image.id: image for image in self._backend.disks.with_ids(base_ids)} if base_ids else {}
        sets = {each.id: each for each in self._backend.sets.all()} if ids else {}
        self._disks, self._bases, self._sets = disks, bases, sets

    def _no_identity(self, encryption_set: EncryptionSet | None) -> str | None:
        """Why the set has no right to its key, if the provider needs an identity and the set has none."""
        if encryption_set is None or encryption_set.identity:
            return None
        if not self._backend.host.plugins.needs_identity(encryption_set.key.provider):
            return None
        return f"disk encryption set {encryption_set.name!r} has no identity"

    def _report_unknown(self, snapshot: InventorySnapshot, unknown: set[UUID]) -> None:
        for disk_id in unknown - self._unknown:
            users = [domain.name for domain in snapshot.domains if _has(domain, disk_id)]
            _log.warning("disk-unknown", extra=fields({"disk": disk_id, "domains": users}))
        self._unknown = unknown


def _has(domain: RunningDomain, disk_id: UUID) -> bool:
    return any(use.disk_id == disk_id for use in domain.uses)

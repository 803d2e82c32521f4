"""Leases of this host on disks and VMs, where several hosts share a store in PostgreSQL.

A lease is a row of the store: one host alone works on the disk or runs the VM. Among the processes of a host,
locks released by the kernel decide (:mod:`virt_sse.system.locks`); a store in SQLite needs no leases, because
it serves one machine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from virt_sse.config import Config
from virt_sse.errors import DiskInUseError, StoreError
from virt_sse.keys.sole_machine import refuse_other_machine
from virt_sse.model.disks import DiskState
from virt_sse.model.hosts import HostIdentity, HostRecord, LeaseUse
from virt_sse.store import LazyStore
from virt_sse.system.database_url import is_postgresql
from virt_sse.system.files import private_folder, write_new
from virt_sse.system.locks import DiskLocks

if TYPE_CHECKING:
    from virt_sse.store.hosts import HostStore

_log = logging.getLogger(__name__)

_BUSY_SECONDS, _BUSY_PAUSE = 5.0, 0.1
"""How long the destination of a migration waits for the end of commands that work on a disk."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Leases:
    """The leases of this host. Without a shared store, every method does nothing, unless said otherwise.

    Every method raises StoreError when the store fails, unless said otherwise.
    """

    def __init__(self, config: Config, opened_store: LazyStore) -> None:
        self._config = config
        self._opened_store = opened_store
        self._path = config.state_directory / "host-id"
        self._locks = DiskLocks(config.state_directory / "disks.lock")
        self._lock = threading.Lock()
        self._identity: HostIdentity | None = None
        self._entering = threading.Lock()
        self._has_entered = False
        self.are_shared = is_postgresql(config.store_url)

    @property
    def identity(self) -> HostIdentity:
        """The identity of this host; made at the first use.

        :raise StoreError: When the file with the id cannot be read or written.
        """
        with self._lock:
            if self._identity is None:
                try:
                    self._identity = HostIdentity(
                        _id_in(self._path), os.uname().nodename, UUID(_BOOT_ID.read_text("ascii").strip())
                    )
                except (OSError, ValueError) as exc:
                    raise StoreError(f"cannot read the id of this host in {self._path}: {exc}") from exc
            return self._identity

    @contextlib.contextmanager
    def starting(
        self, domain_id: UUID, disk_ids: Collection[UUID], *, states: Collection[DiskState]
    ) -> Iterator[None]:
        """Take the leases for a domain; leases taken here are given back if the block fails.

        :raise DiskInUseError: When another host has a lease, or another machine the store in SQLite.
        :raise DiskStateError: When a disk has none of *states* any more.
        :raise HostFencedError: When this host was fenced.
        """
        if not self.are_shared:
            refuse_other_machine(self._config)
            yield
            return
        store = self._entered()
        new = store.start(self.identity, domain_id, disk_ids, states)
        with self._undone(domain_id, new):
            yield

    @contextlib.contextmanager
    def awaiting(
        self,
        domain_id: UUID,
        disk_ids: Collection[UUID],
        *,
        states: Collection[DiskState],
        received: Mapping[UUID, UUID] | None = None,
    ) -> Iterator[None]:
        """Await the leases of a domain that migrates to this host; no longer if the block fails.

        :param received: see :meth:`HostStore.await_handover`; their leases are taken.
        :raise DiskInUseError: When no other host runs the domain, or a command works on a disk.
        :raise DiskStateError: When a disk has none of *states*.
        :raise HostFencedError: When this host was fenced.
        """
        if not self.are_shared:
            yield
            return
        store, deadline = self._entered(), time.monotonic() + _BUSY_SECONDS
        while not store.await_handover(self.identity, domain_id, disk_ids, states, received):
            if time.monotonic() > deadline:
                raise DiskInUseError("a command or another domain uses a disk of the domain as well")
            time.sleep(_BUSY_PAUSE)
        with self._undone(domain_id, None):
            yield

    def awaits(self, domain_id: UUID) -> bool:
        """Whether the domain still runs on another host, from which the domain is about to migrate here."""
        return any(use.is_awaited and use.user_id == domain_id for use in self.uses())

    @contextlib.contextmanager
    def _undone(self, domain_id: UUID, resource_ids: Collection[UUID] | None) -> Iterator[None]:
        """Give leases of a domain back if the block fails."""
        try:
            yield
        except BaseException:
            self.end(domain_id, resource_ids)
            raise

    @contextlib.contextmanager
    def working(self, resource_id: UUID) -> Iterator[None]:
        """Take the lease for work on a disk. A killed command's lease stays with this host.

        :raise DiskInUseError: When another host has the lease.
        :raise HostFencedError: When this host was fenced.
        """
        store = self._entered()
        store.work(self.identity, resource_id)
        try:
            yield
        finally:
            with _logged("the lease on %s is given back later", resource_id):
                store.end_work(self.identity, resource_id)

    def end(self, domain_id: UUID, resource_ids: Collection[UUID] | None = None) -> None:
        """Give the leases of a domain back; a failure is logged, and the agent gives these leases back later.

        :param resource_ids: ``None`` for all of the domain.
        """
        if self.are_shared:
            with _logged("the leases of domain %s are given back later", domain_id):
                self._entered().release(self.identity, domain_id, resource_ids)

    def renew(self) -> None:
        """Note in the store that this host is alive.

        :raise HostFencedError: When this host was fenced.
        """
        if self.are_shared:
            self._hosts.enter(self.identity)

    def uses(self) -> list[LeaseUse]:
        """The uses of the leases that this host has or awaits."""
        return self._hosts.uses(self.identity) if self.are_shared else []

    def held_elsewhere(self, among: Collection[UUID] | None = None) -> set[UUID]:
        """The disks and VMs in use on other hosts; all, or those *among* the given."""
        return self._hosts.held_elsewhere(self.identity, among) if self.are_shared else set()

    def end_killed_work(self) -> None:
        """Give the leases of killed commands back, except on disks with unfinished work."""
        for use in self.uses():
            if use.user_id == self.identity.id:
                with contextlib.suppress(DiskInUseError), self._locks.hold(use.resource_id):
                    self._hosts.end_work(self.identity, use.resource_id)

    def hosts(self) -> list[HostRecord]:
        """All hosts of the store; this host alone without a shared store."""
        if not self.are_shared:
            return [HostRecord(self.identity.id, self.identity.name, 0, False, 0)]
        return self._hosts.all()

    @property
    def _hosts(self) -> HostStore:
        return self._opened_store.full().hosts

    def _entered(self) -> HostStore:
        """The store, with this host registered."""
        store = self._hosts
        with self._entering:
            if not self._has_entered:
                store.enter(self.identity)
                self._has_entered = True
        return store


class LeasedLocks(DiskLocks):
    """Locks of disks among the commands of all hosts: the lock of this host, then the lease."""

    def __init__(self, path: Path, leases: Leases) -> None:
        super().__init__(path)
        self._leases = leases

    @contextlib.contextmanager
    def hold(self, disk_id: UUID, *, wait: bool = False) -> Iterator[None]:
        """Exclude all other commands from the disk during the block; domains of other hosts as well.

        :param wait: wait for a command of this host, instead of raising.
        :raise DiskInUseError: When another command or another host has the disk.
        :raise StoreError: When the lock file or the store cannot be used.
        """
        with super().hold(disk_id, wait=wait), self._leases.working(disk_id):
            yield


def locks_of(config: Config, leases: Leases) -> DiskLocks:
    """The locks of disks: without a shared store, those of this host."""
    path = config.state_directory / "disks.lock"
    return LeasedLocks(path, leases) if leases.are_shared else DiskLocks(path)


def _id_in(path: Path) -> UUID:
    private_folder(path.parent)
    with contextlib.suppress(FileExistsError):
        if not path.exists():
            write_new(path, f"{uuid4()}\n".encode())
    return UUID(path.read_text("ascii").strip())


@contextlib.contextmanager
def _logged(message: str, about: UUID) -> Iterator[None]:
    """Log a failure of the store: the agent repeats the work of the block."""
    try:
        yield
    except StoreError as exc:
        _log.warning(f"{message}: %s", about, exc)

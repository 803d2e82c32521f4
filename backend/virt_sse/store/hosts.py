"""Hosts and leases in the store. A lease is decided by a unique key: of two hosts, one inserts the row."""

from __future__ import annotations

import time
from collections.abc import Collection
from operator import attrgetter
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Engine

from virt_sse.errors import DiskInUseError, DiskStateError, HostFencedError, HostNotFoundError, StoreError
from virt_sse.model.disks import DiskState
from virt_sse.model.hosts import SILENT_SECONDS, HostIdentity, HostRecord, LeaseUse
from virt_sse.store.engine import reading, writing
from virt_sse.store.protected_domains import note_fencing, note_return
from virt_sse.store.tables import disks, hosts, lease_users, leases

_ATTEMPTS = 10


class HostStore:
    """Queries and changes, each a transaction. Every method raises StoreError when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def enter(self, host: HostIdentity) -> None:
        """Register this host, or note that the host is alive.

        After a restart of the machine, the leases of its domains are given back, and a fenced host is a
        member again.

        :raise HostFencedError: When the host was fenced and the machine has not been restarted.
        :raise StoreError: When a machine of another name has the same host id.
        """
        with writing(self._engine) as connection:
            now = _now(connection)
            row = connection.execute(
                sa.select(hosts).where(hosts.c.id == host.id).with_for_update()
            ).one_or_none()
            if row is None:
                values = {"id": host.id, "name": host.name, "boot_id": host.boot_id, "seen": now}
                _insert_missing(connection, hosts, values)
                return
            if row.name != host.name and row.boot_id != host.boot_id:
                raise StoreError(
                    f"the id of this host belongs to host {row.name!r}",
                    hint="remove the file host-id in the state folder; if this is no clone but the renamed "
                    f"machine, also run 'virt-sse host fence {row.name}'",
                )
            if row.boot_id == host.boot_id and row.fenced is not None:
                raise _fenced(host)
            if row.boot_id != host.boot_id:
                of_host = sa.select(leases.c.resource_id).where(leases.c.host_id == host.id)
                is_domain = sa.and_(lease_users.c.resource_id.in_(of_host), lease_users.c.user_id != host.id)
                connection.execute(lease_users.delete().where(is_domain))
                _drop_unused(connection, leases.c.host_id == host.id)
                note_return(connection, host.id)
            changes = {"name": host.name, "seen": now, "boot_id": host.boot_id, "fenced": None}
            connection.execute(hosts.update().where(hosts.c.id == host.id).values(**changes))

    def all(self) -> list[HostRecord]:
        """All hosts, by name."""
        count = (
            sa.select(sa.func.count()).where(leases.c.host_id == hosts.c.id).scalar_subquery().label("leases")
        )
        with reading(self._engine) as connection:
            now = _now(connection)
            rows = connection.execute(sa.select(hosts, count)).all()
        found = [
            HostRecord(row.id, row.name, max(0, now - row.seen), row.fenced is not None, row.leases)
            for row in rows
        ]
        return sorted(found, key=attrgetter("name", "id"))

    def get(self, name: str) -> HostRecord:
        """The host with the given name or id.

        :raise HostNotFoundError: When no host, or more than one host, has the name.
        """
        found = [each for each in self.all() if name in (each.name, str(each.id))]
        if len(found) != 1:
            what = "several hosts are" if found else "no host is"
            raise HostNotFoundError(
                f"{what} called {name[:80]!r}", hint="'virt-sse host list' shows the names and ids"
            )
        return found[0]

    def start(
        self, host: HostIdentity, domain_id: UUID, disk_ids: Collection[UUID], states: Collection[DiskState]
    ) -> list[UUID]:
        """Take the leases for a domain and its disks, all or none, while all disks have one of *states*.

        :return: the disks and VMs not leased for the domain before.
        :raise DiskStateError: When a disk is gone or has another state.
        :raise DiskInUseError: When another host has a lease.
        :raise HostFencedError: When this host was fenced.
        """
        with writing(self._engine) as connection:
            query = sa.select(disks.c.id, disks.c.name, disks.c.state).where(disks.c.id.in_(disk_ids))
            locked = query.order_by(disks.c.id).with_for_update(read=True)
            found = {row.id: row for row in connection.execute(locked)}
            for disk_id in disk_ids:
                if disk_id not in found:
                    raise DiskStateError(f"disk {disk_id} was deleted")
                if DiskState(found[disk_id].state) not in states:
                    raise DiskStateError(f"disk {found[disk_id].name!r} is {found[disk_id].state}")
            return _acquire(connection, host, {domain_id, *disk_ids}, domain_id)

    def work(self, host: HostIdentity, resource_id: UUID) -> None:
        """Take the lease for the work of a command on a disk.

        :raise DiskInUseError: When another host has the lease.
        :raise HostFencedError: When this host was fenced.
        """
        with writing(self._engine) as connection:
            _acquire(connection, host, {resource_id}, host.id)

    def end_work(self, host: HostIdentity, resource_id: UUID) -> None:
        """Give the lease of a command back, unless the disk is unfinished: this host finishes the work."""
        with writing(self._engine) as connection:
            state = connection.scalar(sa.select(disks.c.state).where(disks.c.id == resource_id))
            if state in (None, DiskState.READY.value):
                _release(connection, host, host.id, [resource_id])

    def release(
        self, host: HostIdentity, user_id: UUID, resource_ids: Collection[UUID] | None = None
    ) -> None:
        """Give leases of a domain back.

        :param resource_ids: ``None`` for all of the domain.
        """
        with writing(self._engine) as connection:
            if resource_ids is None:
                query = sa.select(lease_users.c.resource_id).where(lease_users.c.user_id == user_id)
                resource_ids = connection.scalars(query).all()
            _release(connection, host, user_id, resource_ids)

    def uses(self, host: HostIdentity) -> list[LeaseUse]:
        """The uses of all leases of this host."""
        query = sa.select(lease_users).join(leases).where(leases.c.host_id == host.id)
        with reading(self._engine) as connection:
            now = _now(connection)
            rows = connection.execute(query).all()
        return [LeaseUse(row.resource_id, row.user_id, max(0, now - row.since)) for row in rows]

    def fence(self, host: HostRecord) -> int:
        """Take all leases from a host whose machine is off, and refuse the host until the machine restarts.

        :return: number of leases.
        :raise DiskInUseError: When the host is alive.
        """
        with writing(self._engine) as connection:
            now = _now(connection)
            row = connection.execute(sa.select(hosts).where(hosts.c.id == host.id).with_for_update()).one()
            if now - row.seen < SILENT_SECONDS and row.fenced is None:
                raise DiskInUseError(
                    f"host {host.name!r} is alive: seen {max(0, now - row.seen)} s ago",
                    hint=f"switch the machine off; after {SILENT_SECONDS} s the host can be fenced",
                )
            connection.execute(hosts.update().where(hosts.c.id == host.id).values(fenced=now))
            note_fencing(connection, host.id)
            return connection.execute(leases.delete().where(leases.c.host_id == host.id)).rowcount


def _acquire(
    connection: Connection, host: HostIdentity, resource_ids: Collection[UUID], user_id: UUID
) -> list[UUID]:
    """Take leases, in the order of their ids: two transactions never wait for each other.

    The lock on the host's row makes a concurrent :meth:`HostStore.fence` wait, or be seen.
    """
    member = sa.select(hosts.c.fenced).where(hosts.c.id == host.id).with_for_update(read=True)
    row = connection.execute(member).one_or_none()
    if row is None or row.fenced is not None:
        raise _fenced(host)
    now, new = _now(connection), []
    for resource_id in sorted(resource_ids):
        _own(connection, host, resource_id)
        values = {"resource_id": resource_id, "user_id": user_id, "since": now}
        if _insert_missing(connection, lease_users, values):
            new.append(resource_id)
    return new


def _own(connection: Connection, host: HostIdentity, resource_id: UUID) -> None:
    query = sa.select(leases.c.host_id).where(leases.c.resource_id == resource_id).with_for_update()
    for _ in range(_ATTEMPTS):  # the lease in the way may be given back between the two statements
        _insert_missing(connection, leases, {"resource_id": resource_id, "host_id": host.id})
        owner = connection.scalar(query)
        if owner == host.id:
            return
        if owner is not None:
            name = connection.scalar(sa.select(hosts.c.name).where(hosts.c.id == owner))
            called = connection.scalar(sa.select(disks.c.name).where(disks.c.id == resource_id))
            what = f"disk {called!r}" if called else f"VM or disk {resource_id}"
            raise DiskInUseError(
                f"{what} is in use on host {name!r}",
                hint=f"if that machine is off for certain: 'virt-sse host fence {name}'",
            )
    raise DiskInUseError(f"the lease on {resource_id} changes hands")


def _release(
    connection: Connection, host: HostIdentity, user_id: UUID, resource_ids: Collection[UUID]
) -> None:
    wanted = sa.and_(leases.c.host_id == host.id, leases.c.resource_id.in_(resource_ids))
    locked = sa.select(leases.c.resource_id).where(wanted).order_by(leases.c.resource_id).with_for_update()
    owned = connection.scalars(locked).all()
    is_use = sa.and_(lease_users.c.resource_id.in_(owned), lease_users.c.user_id == user_id)
    connection.execute(lease_users.delete().where(is_use))
    _drop_unused(connection, leases.c.resource_id.in_(owned))


def _drop_unused(connection: Connection, condition: sa.ColumnElement[bool]) -> None:
    used = sa.exists().where(lease_users.c.resource_id == leases.c.resource_id)
    connection.execute(leases.delete().where(condition, ~used))


def _insert_missing(connection: Connection, table: sa.Table, values: dict[str, object]) -> bool:
    """Insert a row unless its key is taken; waits for a concurrent insertion. Whether the row is new."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).values(**values).on_conflict_do_nothing()
    return connection.execute(statement.returning(*table.primary_key)).first() is not None


def _now(connection: Connection) -> int:
    """The time by the database's clock, in seconds since 1970."""
    if connection.dialect.name == "postgresql":
        return int(connection.scalar(sa.select(sa.func.extract("epoch", sa.func.clock_timestamp()))) or 0)
    return int(time.time())


def _fenced(host: HostIdentity) -> HostFencedError:
    return HostFencedError(
        f"host {host.name!r} was fenced: other hosts may use its disks",
        hint="restart this machine; a restart ends all guests and makes the host a member again",
    )

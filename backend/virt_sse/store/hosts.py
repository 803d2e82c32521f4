"""Hosts and leases in the store. A lease is decided by a unique key: of two hosts, one inserts the row."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
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
from virt_sse.store.tables import disks, hosts, lease_handovers, lease_users, leases

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
                _end_handovers(connection, host.id)
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
        :raise DiskInUseError: When another host has a lease, or a disk is about to migrate to another host.
        :raise HostFencedError: When this host was fenced.
        """
        with writing(self._engine) as connection:
            _check_states(connection, disk_ids, states)
            return _acquire(connection, host, {domain_id, *disk_ids}, domain_id)

    def await_handover(
        self,
        host: HostIdentity,
        domain_id: UUID,
        disk_ids: Collection[UUID],
        states: Collection[DiskState],
        received: Mapping[UUID, UUID] | None = None,
    ) -> bool:
        """Let this host get the leases of a domain from another host, once the other host gives them back.

        :param received: disks of this host that get the content of disks of the domain, by the ids of the
            latter. This host takes the leases of the former, and does not await those of the latter.
        :return: whether this host gets the leases; no, while a command or another domain uses a disk, too.
        :raise DiskStateError: When a disk is gone or has another state.
        :raise DiskInUseError: When the domain has no lease of another host, or its leases go to a third host;
            when another host has the lease of a disk in *received*.
        :raise HostFencedError: When this host was fenced.
        """
        received = received or {}
        awaited = sorted({domain_id, *disk_ids})
        resource_ids = sorted({*awaited, *received})
        with writing(self._engine) as connection:
            _check_states(connection, disk_ids, states)
            _check_states(connection, received.values(), [DiskState.RECEIVING])
            _check_member(connection, host)
            held = sa.select(leases).where(leases.c.resource_id.in_(resource_ids))
            locked = held.order_by(leases.c.resource_id).with_for_update()
            holders = {row.resource_id: row.host_id for row in connection.execute(locked)}
            query = sa.select(lease_users).where(lease_users.c.resource_id.in_(resource_ids))
            users: dict[UUID, set[UUID]] = {}
            for row in connection.execute(query):
                users.setdefault(row.resource_id, set()).add(row.user_id)
            source = holders.get(domain_id)
            for resource_id in resource_ids:
                is_of_domain = domain_id in users.get(resource_id, ())
                if source in (None, host.id) or holders.get(resource_id) != source or not is_of_domain:
                    raise DiskInUseError(
                        f"no other host has the leases of domain {domain_id} and its disks",
                        hint="the source of a migration must be a host of the same store, with its agent; "
                        "after an offline migration, start the domain again",
                    )
            if any(len(found) > 1 for found in users.values()):
                return False
            if received:
                _acquire(connection, host, received.values(), domain_id)
            now = _now(connection)
            for resource_id in awaited:
                values = {"resource_id": resource_id, "host_id": host.id, "since": now}
                _insert_missing(connection, lease_handovers, values)
                _refuse_handover(connection, resource_id, but_to=host.id)
            return True

    def work(self, host: HostIdentity, resource_id: UUID) -> None:
        """Take the lease for the work of a command on a disk.

        :raise DiskInUseError: When another host has the lease, or the disk is about to migrate.
        :raise HostFencedError: When this host was fenced.
        """
        with writing(self._engine) as connection:
            _acquire(connection, host, {resource_id}, host.id)

    def end_work(self, host: HostIdentity, resource_id: UUID) -> None:
        """Give the lease of a command back, unless the disk is unfinished: this host finishes the work.

        The lease of a disk in state ``receiving`` stays, too: the domain is to migrate to this host.
        """
        with writing(self._engine) as connection:
            state = connection.scalar(sa.select(disks.c.state).where(disks.c.id == resource_id))
            if state is None or (DiskState(state).is_at_rest and state != DiskState.RECEIVING.value):
                _release(connection, host, host.id, [resource_id])

    def release(
        self, host: HostIdentity, user_id: UUID, resource_ids: Collection[UUID] | None = None
    ) -> None:
        """Give leases of a domain back: to the host that awaits them, if any. Likewise, await them no longer.

        :param resource_ids: ``None`` for all of the domain.
        """
        with writing(self._engine) as connection:
            if resource_ids is None:
                query = sa.select(lease_users.c.resource_id).where(lease_users.c.user_id == user_id)
                resource_ids = connection.scalars(query).all()
            _release(connection, host, user_id, resource_ids)

    def uses(self, host: HostIdentity) -> list[LeaseUse]:
        """The uses of all leases that this host has or awaits."""
        query = sa.select(lease_users).join(leases).where(leases.c.host_id == host.id)
        columns = lease_users.c.resource_id, lease_users.c.user_id, lease_handovers.c.since
        is_same = lease_handovers.c.resource_id == lease_users.c.resource_id
        awaited = sa.select(*columns).where(is_same, lease_handovers.c.host_id == host.id)
        with reading(self._engine) as connection:
            now = _now(connection)
            rows = [(row, False) for row in connection.execute(query)]
            rows += [(row, True) for row in connection.execute(awaited)]
        return [
            LeaseUse(row.resource_id, row.user_id, max(0, now - row.since), is_awaited=is_awaited)
            for row, is_awaited in rows
        ]

    def held_elsewhere(self, host: HostIdentity, among: Collection[UUID] | None = None) -> set[UUID]:
        """The disks and VMs with a lease of another host; all, or those *among* the given."""
        held = sa.select(leases.c.resource_id).where(leases.c.host_id != host.id)
        if among is not None:
            held = held.where(leases.c.resource_id.in_(among))
        with reading(self._engine) as connection:
            return set(connection.scalars(held))

    def fence(self, host: HostRecord) -> int:
        """Take all leases from a host whose machine is off, and refuse the host until the machine restarts.

        :return: number of leases.
        :raise DiskInUseError: When the host is alive.
        """
        with writing(self._engine) as connection:
            now = _now(connection)
            row = connection.execute(sa.select(hosts).where(hosts.c.id == host.id).with_for_update()).one()
            refuse_alive(
                HostRecord(host.id, host.name, max(0, now - row.seen), row.fenced is not None, host.leases)
            )
            connection.execute(hosts.update().where(hosts.c.id == host.id).values(fenced=now))
            note_fencing(connection, host.id)
            handed_over = _end_handovers(connection, host.id)
            deleted = connection.execute(leases.delete().where(leases.c.host_id == host.id)).rowcount
            return handed_over + deleted


def refuse_alive(host: HostRecord) -> None:
    """Refuse to fence a host that was seen lately.

    :raise DiskInUseError: When the host is alive.
    """
    if host.silent_seconds < SILENT_SECONDS and not host.is_fenced:
        raise DiskInUseError(
            f"host {host.name!r} is alive: seen {host.silent_seconds} s ago",
            hint=f"switch the machine off; after {SILENT_SECONDS} s the host can be fenced",
        )


def _check_states(connection: Connection, disk_ids: Collection[UUID], states: Collection[DiskState]) -> None:
    """Check the states of disks, which then stay until the end of the transaction.

    :raise DiskStateError: When a disk is gone or has none of *states*.
    """
    query = sa.select(disks.c.id, disks.c.name, disks.c.state).where(disks.c.id.in_(disk_ids))
    locked = query.order_by(disks.c.id).with_for_update(read=True)
    found = {row.id: row for row in connection.execute(locked)}
    for disk_id in disk_ids:
        if disk_id not in found:
            raise DiskStateError(f"disk {disk_id} was deleted")
        if DiskState(found[disk_id].state) not in states:
            raise DiskStateError(f"disk {found[disk_id].name!r} is {found[disk_id].state}")


def _check_member(connection: Connection, host: HostIdentity) -> None:
    """Refuse a host that was fenced. A concurrent :meth:`HostStore.fence` waits, or is seen."""
    member = sa.select(hosts.c.fenced).where(hosts.c.id == host.id).with_for_update(read=True)
    row = connection.execute(member).one_or_none()
    if row is None or row.fenced is not None:
        raise _fenced(host)


def _acquire(
    connection: Connection, host: HostIdentity, resource_ids: Collection[UUID], user_id: UUID
) -> list[UUID]:
    """Take leases, in the order of their ids: two transactions never wait for each other."""
    _check_member(connection, host)
    now, new = _now(connection), []
    for resource_id in sorted(resource_ids):
        _own(connection, host, resource_id)
        values = {"resource_id": resource_id, "user_id": user_id, "since": now}
        if _insert_missing(connection, lease_users, values):
            _refuse_handover(connection, resource_id)
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
            what, name = _called(connection, resource_id), _name(connection, owner)
            raise DiskInUseError(
                f"{what} is in use on host {name!r}",
                hint=f"if that machine is off for certain: 'virt-sse host fence {name}'",
            )
    raise DiskInUseError(f"the lease on {resource_id} changes hands")


def _refuse_handover(connection: Connection, resource_id: UUID, *, but_to: UUID | None = None) -> None:
    """Refuse a use of a lease that another host awaits; that lease must have the domain as its only user.

    :raise DiskInUseError: When another host than *but_to* awaits the lease.
    """
    query = sa.select(lease_handovers.c.host_id).where(lease_handovers.c.resource_id == resource_id)
    target = connection.scalar(query)
    if target not in (None, but_to):
        what, name = _called(connection, resource_id), _name(connection, target)
        raise DiskInUseError(
            f"{what} is about to migrate to host {name!r}", hint="repeat the command after the migration"
        )


def _called(connection: Connection, resource_id: UUID) -> str:
    name = connection.scalar(sa.select(disks.c.name).where(disks.c.id == resource_id))
    return f"disk {name!r}" if name else f"VM or disk {resource_id}"


def _name(connection: Connection, host_id: UUID) -> str:
    return str(connection.scalar(sa.select(hosts.c.name).where(hosts.c.id == host_id)))


def _end_handovers(connection: Connection, host_id: UUID) -> int:
    """End the handovers from and to a host of which no process is left.

    :return: number of leases that went from the host to others.
    """
    connection.execute(lease_handovers.delete().where(lease_handovers.c.host_id == host_id))
    held = sa.select(leases.c.resource_id).where(leases.c.host_id == host_id)
    return len(_hand_over(connection, connection.scalars(held).all()))


def _hand_over(connection: Connection, resource_ids: Collection[UUID]) -> set[UUID]:
    """Give leases to the hosts that await them.

    :return: the leases with a new holder.
    """
    query = sa.select(lease_handovers).where(lease_handovers.c.resource_id.in_(resource_ids))
    found = connection.execute(query).all()
    for row in found:
        lease = leases.c.resource_id == row.resource_id
        connection.execute(leases.update().where(lease).values(host_id=row.host_id))
        use = lease_users.c.resource_id == row.resource_id
        connection.execute(lease_users.update().where(use).values(since=row.since))
    new = {row.resource_id for row in found}
    connection.execute(lease_handovers.delete().where(lease_handovers.c.resource_id.in_(new)))
    return new


def _release(
    connection: Connection, host: HostIdentity, user_id: UUID, resource_ids: Collection[UUID]
) -> None:
    of_user = sa.select(lease_users.c.resource_id).where(
        lease_users.c.user_id == user_id, lease_users.c.resource_id.in_(resource_ids)
    )
    query = sa.select(leases).where(leases.c.resource_id.in_(of_user))
    rows = connection.execute(query.order_by(leases.c.resource_id).with_for_update()).all()
    owned = {row.resource_id for row in rows if row.host_id == host.id}
    is_awaited = lease_handovers.c.resource_id.in_([row.resource_id for row in rows])
    connection.execute(lease_handovers.delete().where(is_awaited, lease_handovers.c.host_id == host.id))
    ended = owned - _hand_over(connection, owned)
    is_use = sa.and_(lease_users.c.resource_id.in_(ended), lease_users.c.user_id == user_id)
    connection.execute(lease_users.delete().where(is_use))
    _drop_unused(connection, leases.c.resource_id.in_(ended))


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

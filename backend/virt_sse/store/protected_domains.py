"""Protected domains in the store. A domain is one host's: another host takes the row by compare-and-swap."""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from virt_sse.errors import DiskInUseError, HostNotFoundError, VmStateError
from virt_sse.model.protected_domains import Evacuation, ProtectedDomain
from virt_sse.store.engine import reading, writing
from virt_sse.store.statements import upsert
from virt_sse.store.tables import hosts, leases
from virt_sse.store.tables import protected_domains as domains


class ProtectedDomainStore:
    """Queries and changes, each a transaction. Every method raises StoreError when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def all(self) -> list[ProtectedDomain]:
        """All protected domains, by name."""
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(domains)).all()
        return sorted(map(_domain, rows), key=attrgetter("name", "id"))

    def with_ids(self, ids: Collection[UUID]) -> list[ProtectedDomain]:
        """The protected domains among *ids*."""
        query = sa.select(domains).where(domains.c.id.in_(ids))
        with reading(self._engine) as connection:
            return [_domain(row) for row in connection.execute(query)]

    def protect(self, domain: ProtectedDomain) -> None:
        """Add a domain, or replace the domain with its id.

        :raise VmStateError: When another host has the domain.
        """
        with writing(self._engine) as connection:
            query = sa.select(hosts.c.name).join(domains, domains.c.host_id == hosts.c.id)
            other = sa.and_(domains.c.id == domain.id, domains.c.host_id != domain.host_id)
            name = connection.scalar(query.where(other))
            if name is not None:
                raise VmStateError(f"domain {domain.name!r} is a protected domain of host {name!r}")
            upsert(connection, domains, {"id": domain.id}, _values(domain))

    def follow(self, domain: ProtectedDomain, before: UUID) -> None:
        """Replace a domain by its present state, unless a host other than *before* has it meanwhile."""
        with writing(self._engine) as connection:
            wanted = sa.and_(domains.c.id == domain.id, domains.c.host_id == before)
            connection.execute(domains.update().where(wanted).values(**_values(domain)))

    def unprotect(self, domain_id: UUID) -> bool:
        """Remove a domain: whether there was one."""
        with writing(self._engine) as connection:
            return connection.execute(domains.delete().where(domains.c.id == domain_id)).rowcount == 1

    def take(self, domain: ProtectedDomain, host_id: UUID) -> None:
        """Make a fenced host's domain a domain of the host *host_id*.

        :raise HostNotFoundError: When the domain's host is no longer fenced, i.e. its machine was restarted.
        :raise DiskInUseError: When another host has the domain meanwhile, or runs the domain.
        """
        with writing(self._engine) as connection:
            state = sa.select(hosts.c.fenced).where(hosts.c.id == domain.host_id).with_for_update(read=True)
            if connection.scalar(state) is None:
                raise HostNotFoundError("the machine of the domain's host was restarted meanwhile")
            runs = sa.exists().where(leases.c.resource_id == domain.id)
            wanted = sa.and_(domains.c.id == domain.id, domains.c.host_id == domain.host_id, ~runs)
            if not connection.execute(domains.update().where(wanted).values(host_id=host_id)).rowcount:
                raise DiskInUseError("another host runs the domain, or has taken the domain over")

    def give_back(self, domain: ProtectedDomain, host_id: UUID) -> None:
        """Undo :meth:`take`: the domain could not be started here, and another host may try."""
        with writing(self._engine) as connection:
            wanted = sa.and_(domains.c.id == domain.id, domains.c.host_id == host_id)
            connection.execute(domains.update().where(wanted).values(host_id=domain.host_id))

    def settle(self, domain_id: UUID) -> None:
        """Note that nothing is left to do for a domain."""
        with writing(self._engine) as connection:
            changes = {"evacuation": Evacuation.NOTHING.value}
            connection.execute(domains.update().where(domains.c.id == domain_id).values(**changes))


def note_fencing(connection: Connection, host_id: UUID) -> None:
    """Note what to do with the domains of a host that is being fenced; its leases tell which domains ran."""
    ran = sa.exists().where(leases.c.resource_id == domains.c.id, leases.c.host_id == host_id)
    idle = sa.and_(domains.c.host_id == host_id, domains.c.evacuation == Evacuation.NOTHING.value)
    connection.execute(domains.update().where(idle).values(evacuation=Evacuation.DEFINE.value))
    changes = {"host_id": host_id, "evacuation": Evacuation.START.value}
    connection.execute(domains.update().where(ran).values(**changes))


def note_return(connection: Connection, host_id: UUID) -> None:
    """Note that a host's machine was restarted: its domains are its own again."""
    changes = {"evacuation": Evacuation.NOTHING.value}
    connection.execute(domains.update().where(domains.c.host_id == host_id).values(**changes))


def _domain(row: Any) -> ProtectedDomain:
    return ProtectedDomain(
        id=row.id,
        name=row.name,
        host_id=row.host_id,
        definition=row.definition,
        is_autostarted=row.is_autostarted,
        seal=row.seal,
        evacuation=Evacuation(row.evacuation),
    )


def _values(domain: ProtectedDomain) -> dict[str, object]:
    return {
        "name": domain.name,
        "host_id": domain.host_id,
        "definition": domain.definition,
        "is_autostarted": domain.is_autostarted,
        "seal": domain.seal,
        "evacuation": domain.evacuation.value,
    }

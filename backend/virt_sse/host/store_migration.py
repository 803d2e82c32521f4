"""The move of a store into another database, e.g. from SQLite to PostgreSQL.

Order, so that a killed move leaves the old store in charge, or is finished by a repetition:

1. The old store is locked against changes.
2. All rows are copied into the new database, verified, and marked as an unfinished copy, in one transaction.
3. The old store is marked as moved: the point of no return. Every process refuses a store with this mark.
4. The mark of the new database is removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from virt_sse.config import Config
from virt_sse.errors import AgentError, InvalidValueError, StoreError, StoreMovedError
from virt_sse.host.backup import without_agent
from virt_sse.keys.leases import Leases
from virt_sse.model.hosts import HostState
from virt_sse.store import LazyStore, ownership
from virt_sse.store.copying import TableContent, move, moved_contents, settle_copy
from virt_sse.store.engine import parsed_url
from virt_sse.system.database_url import refuse_password


def _refuse_agents(config: Config) -> None:
    """Refuse to move a shared store under the agents of other hosts.

    :raise AgentError: When a host was seen within the last minute.
    """
    with contextlib.closing(LazyStore(config.store_url)) as store:
        leases = Leases(config, store)
        with contextlib.suppress(StoreMovedError):
            for host in leases.hosts():
                if host.id != leases.identity.id and host.state is HostState.ALIVE:
                    raise AgentError(
                        f"host {host.name!r} was seen {host.silent_seconds} s ago",
                        hint="stop the agents of all hosts first, and wait a minute",
                    )


def migrate_store(config: Config, target_url: str) -> Mapping[str, TableContent]:
    """Move the store of *config* into the database *target_url*; a repetition finishes a killed move.

    The configuration is not changed: from the move on, all commands name the new database until it is.

    :return: the verified content by table.
    :raise AgentError: When the agent of a host runs.
    :raise InvalidValueError: When *target_url* has a password, which other users could see, or is the store.
    :raise StoreError: When a database fails, or the new database has rows of another store.
    """
    refuse_password(target_url)
    place = ownership.described(parsed_url(target_url))
    if ownership.described(parsed_url(config.store_url)) == place:
        raise InvalidValueError(f"the store is the {place} already")
    with without_agent(config):
        _refuse_agents(config)
        found, moved_to = moved_contents(config.store_url)
        if found is None:
            found = move(config.store_url, target_url, place)
        elif moved_to != place:
            raise StoreError(f"the store has moved to the {moved_to}, not to the {place}")
        settle_copy(target_url, found)
    return found

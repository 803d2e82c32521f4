"""Protected domains in the store: one host takes a fenced host's domain, also in a race."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Barrier

import pytest

from support.stores import execute
from virt_sse.errors import DiskInUseError, HostNotFoundError, VirtSseError, VmStateError
from virt_sse.model.hosts import SILENT_SECONDS, HostIdentity
from virt_sse.model.protected_domains import Evacuation, ProtectedDomain
from virt_sse.store.store import Store


def host(name: str) -> HostIdentity:
    return HostIdentity(uuid.uuid5(uuid.NAMESPACE_OID, name), name, uuid.uuid5(uuid.NAMESPACE_URL, name))


A, B, C = host("a"), host("b"), host("c")
WEB = ProtectedDomain(uuid.UUID(int=1), "web", A.id, "<domain/>", False, bytes(32))
DB = ProtectedDomain(uuid.UUID(int=2), "db", A.id, "<domain/>", True, bytes(32))


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(Store(store_url)) as store:
        for each in (A, B, C):
            store.hosts.enter(each)
        for domain in (WEB, DB):
            store.protected_domains.protect(domain)
        store.hosts.start(A, WEB.id, [], [])
        yield store


def fence(store: Store, store_url: str, name: str = "a") -> None:
    execute(store_url, "UPDATE hosts SET seen = seen - :age", age=SILENT_SECONDS)
    store.hosts.fence(store.hosts.get(name))


def states(store: Store) -> dict[str, tuple[uuid.UUID, Evacuation]]:
    return {each.name: (each.host_id, each.evacuation) for each in store.protected_domains.all()}


def test_a_domain_comes_back_as_it_was(store: Store) -> None:
    assert store.protected_domains.all() == [DB, WEB]
    changed = dataclasses.replace(WEB, name="web-2", definition="<domain><name>ü</name></domain>")
    store.protected_domains.protect(changed)
    assert store.protected_domains.all() == [DB, changed]
    assert store.protected_domains.unprotect(WEB.id)
    assert not store.protected_domains.unprotect(WEB.id)
    assert store.protected_domains.all() == [DB]


def test_another_host_cannot_protect_the_domain_of_a_host(store: Store) -> None:
    with pytest.raises(VmStateError, match="domain 'web' is a protected domain of host 'a'"):
        store.protected_domains.protect(dataclasses.replace(WEB, host_id=B.id))


def test_fencing_tells_which_domains_ran(store: Store, store_url: str) -> None:
    fence(store, store_url)
    assert states(store) == {"web": (A.id, Evacuation.START), "db": (A.id, Evacuation.DEFINE)}
    fence(store, store_url)
    assert states(store) == {"web": (A.id, Evacuation.START), "db": (A.id, Evacuation.DEFINE)}


def test_a_domain_that_ran_elsewhere_is_evacuated_from_there(store: Store, store_url: str) -> None:
    store.hosts.start(B, DB.id, [], [])
    fence(store, store_url, "b")
    assert states(store) == {"web": (A.id, Evacuation.NOTHING), "db": (B.id, Evacuation.START)}


def test_one_host_takes_a_domain_and_others_are_refused(store: Store, store_url: str) -> None:
    with pytest.raises(HostNotFoundError, match="was restarted meanwhile"):
        store.protected_domains.take(WEB, B.id)
    fence(store, store_url)
    store.protected_domains.take(WEB, B.id)
    with pytest.raises(DiskInUseError, match="another host"):
        store.protected_domains.take(WEB, C.id)
    assert states(store)["web"] == (B.id, Evacuation.START)
    store.protected_domains.give_back(WEB, B.id)
    store.protected_domains.take(WEB, C.id)
    store.protected_domains.settle(WEB.id)
    assert states(store)["web"] == (C.id, Evacuation.NOTHING)


def test_a_domain_that_runs_on_another_host_is_not_taken(store: Store, store_url: str) -> None:
    fence(store, store_url)
    store.hosts.start(C, WEB.id, [], [])
    with pytest.raises(DiskInUseError, match="another host runs the domain"):
        store.protected_domains.take(WEB, B.id)


def test_of_racing_hosts_one_takes_a_domain(store: Store, store_url: str) -> None:
    fence(store, store_url)
    for _ in range(20):
        barrier = Barrier(2)

        def take(taker: HostIdentity, barrier: Barrier = barrier) -> bool:
            barrier.wait()
            try:
                store.protected_domains.take(WEB, taker.id)
            except VirtSseError:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            won = list(pool.map(take, (B, C)))
        assert won in ([True, False], [False, True])
        store.protected_domains.give_back(WEB, (B if won[0] else C).id)


def test_a_restarted_host_has_its_domains_again(store: Store, store_url: str) -> None:
    fence(store, store_url)
    store.protected_domains.take(DB, B.id)
    store.hosts.enter(dataclasses.replace(A, boot_id=uuid.uuid4()))
    assert states(store) == {"web": (A.id, Evacuation.NOTHING), "db": (B.id, Evacuation.DEFINE)}


def test_a_domain_is_followed_by_the_host_that_had_it_alone(store: Store) -> None:
    moved = dataclasses.replace(WEB, host_id=B.id, definition="<domain>moved</domain>")
    store.protected_domains.follow(moved, C.id)
    assert WEB in store.protected_domains.all()
    store.protected_domains.follow(moved, A.id)
    assert moved in store.protected_domains.all()

"""Leases of hosts on disks and VMs: one host at a time, kept over kills, taken over after fencing alone."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from threading import Barrier

import pytest
from test_store import disk

from support.stores import execute
from virt_sse.errors import (
    DiskInUseError,
    DiskStateError,
    HostFencedError,
    HostNotFoundError,
    StoreError,
)
from virt_sse.model.disks import DiskState
from virt_sse.model.hosts import SILENT_SECONDS, HostIdentity, HostState
from virt_sse.store.store import Store

READY = [DiskState.READY]
VM = uuid.UUID(int=1)


def host(name: str) -> HostIdentity:
    return HostIdentity(uuid.uuid5(uuid.NAMESPACE_OID, name), name, uuid.uuid5(uuid.NAMESPACE_URL, name))


A, B = host("a"), host("b")


def restarted(before: HostIdentity) -> HostIdentity:
    return dataclasses.replace(before, boot_id=uuid.uuid4())


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    with closing(Store(store_url)) as store:
        for each in (A, B):
            store.hosts.enter(each)
        yield store


def leases(store: Store) -> dict[str, int]:
    return {each.name: each.leases for each in store.hosts.all()}


def make_silent(store_url: str, name: str) -> None:
    execute(
        store_url, "UPDATE hosts SET seen = seen - :age WHERE name = :name", age=SILENT_SECONDS, name=name
    )


def test_a_disk_runs_on_one_host(store: Store) -> None:
    store.add(one := disk("one"))
    store.add(two := disk("two"))
    assert set(store.hosts.start(A, VM, [one.id], READY)) == {VM, one.id}
    assert store.hosts.start(A, VM, [one.id], READY) == []
    other = uuid.uuid4()
    with pytest.raises(DiskInUseError, match="disk 'one' is in use on host 'a'") as caught:
        store.hosts.start(B, other, [two.id, one.id], READY)
    assert caught.value.hint
    assert "host fence a" in caught.value.hint
    with pytest.raises(DiskInUseError, match="in use on host 'a'"):
        store.hosts.start(B, VM, [two.id], READY)
    with pytest.raises(DiskInUseError):
        store.hosts.work(B, one.id)
    assert leases(store) == {"a": 2, "b": 0}  # a refused start takes nothing
    store.hosts.release(B, VM)
    assert leases(store) == {"a": 2, "b": 0}
    store.hosts.release(A, VM)
    store.hosts.start(B, other, [two.id, one.id], READY)
    assert leases(store) == {"a": 0, "b": 3}


def test_a_disk_that_is_not_ready_is_refused_in_the_same_transaction(store: Store) -> None:
    store.add(one := disk("one", state=DiskState.COPYING))
    with pytest.raises(DiskStateError, match="disk 'one' is copying"):
        store.hosts.start(A, VM, [one.id], READY)
    with pytest.raises(DiskStateError, match="was deleted"):
        store.hosts.start(A, VM, [uuid.uuid4()], READY)
    assert leases(store) == {"a": 0, "b": 0}
    store.hosts.start(A, VM, [one.id], [*READY, DiskState.COPYING])


def test_a_lease_ends_with_its_last_use(store: Store) -> None:
    store.add(one := disk("one"))
    other = uuid.uuid4()
    store.hosts.work(A, one.id)
    store.hosts.start(A, VM, [one.id], READY)
    store.hosts.start(A, other, [one.id], READY)
    assert {(use.resource_id, use.user_id) for use in store.hosts.uses(A)} == {
        (one.id, A.id),
        (one.id, VM),
        (VM, VM),
        (one.id, other),
        (other, other),
    }
    store.hosts.end_work(A, one.id)
    store.hosts.release(A, VM)
    with pytest.raises(DiskInUseError):
        store.hosts.work(B, one.id)
    store.hosts.release(A, other, [one.id])
    store.hosts.work(B, one.id)


def test_unfinished_work_stays_with_its_host(store: Store) -> None:
    store.add(one := disk("one", state=DiskState.CREATING))
    store.hosts.work(A, one.id)
    store.hosts.end_work(A, one.id)
    with pytest.raises(DiskInUseError):
        store.hosts.work(B, one.id)
    store.set_state(one.id, DiskState.READY)
    store.hosts.end_work(A, one.id)
    store.hosts.work(B, one.id)
    store.set_state(one.id, DiskState.DELETED)
    store.hosts.end_work(B, one.id)
    store.hosts.work(A, one.id)


def test_a_silent_host_keeps_its_leases_until_fenced(store: Store, store_url: str) -> None:
    store.add(one := disk("one"))
    store.hosts.start(A, VM, [one.id], READY)
    with pytest.raises(DiskInUseError, match=r"host 'a' is alive: seen \d+ s ago"):
        store.hosts.fence(store.hosts.get("a"))
    make_silent(store_url, "a")
    assert store.hosts.get(str(A.id)).state is HostState.SILENT
    with pytest.raises(DiskInUseError):
        store.hosts.start(B, VM, [one.id], READY)
    assert store.hosts.fence(store.hosts.get("a")) == 2
    assert store.hosts.get("a").state is HostState.FENCED
    store.hosts.start(B, VM, [one.id], READY)
    for action in (
        lambda: store.hosts.enter(A),
        lambda: store.hosts.work(A, uuid.uuid4()),
        lambda: store.hosts.start(A, uuid.uuid4(), [one.id], READY),
    ):
        with pytest.raises(HostFencedError, match="host 'a' was fenced"):
            action()
    store.hosts.release(A, VM)  # of the end of a guest on a host that was not off
    assert leases(store) == {"a": 0, "b": 2}
    store.hosts.enter(restarted(A))
    assert store.hosts.get("a").state is HostState.ALIVE
    with pytest.raises(DiskInUseError, match="on host 'b'"):
        store.hosts.work(A, one.id)


def test_a_restart_ends_the_leases_of_domains_and_keeps_unfinished_work(store: Store) -> None:
    store.add(one := disk("one"))
    store.add(two := disk("two", state=DiskState.DELETING))
    store.hosts.start(A, VM, [one.id], READY)
    store.hosts.work(A, two.id)
    store.hosts.enter(restarted(A))
    assert [use.resource_id for use in store.hosts.uses(A)] == [two.id]
    store.hosts.start(B, VM, [one.id], READY)


def test_a_clone_with_the_same_id_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="belongs to host 'a'") as caught:
        store.hosts.enter(restarted(dataclasses.replace(A, name="clone")))
    assert caught.value.hint
    with pytest.raises(HostNotFoundError, match="no host"):
        store.hosts.get("clone")
    store.hosts.enter(dataclasses.replace(A, name="renamed"))
    assert store.hosts.get("renamed").id == A.id
    store.hosts.enter(A)
    store.hosts.enter(dataclasses.replace(A, id=uuid.uuid4()))
    with pytest.raises(HostNotFoundError, match="several hosts"):
        store.hosts.get("a")


def test_of_two_hosts_exactly_one_starts_a_disk_a_hundred_times(store: Store, store_url: str) -> None:
    one, two = disk("one"), disk("two")
    for each in (one, two):
        store.add(each)
    rounds, barrier = 100, Barrier(2)

    def starts(each: HostIdentity, opened: Store) -> list[bool]:
        won = []
        for number in range(rounds):
            barrier.wait(30)
            try:
                opened.hosts.start(each, uuid.UUID(int=number + 2), [one.id, two.id], READY)
                won.append(True)
            except DiskInUseError:
                won.append(False)
            barrier.wait(30)
            opened.hosts.release(each, uuid.UUID(int=number + 2))
        return won

    with ExitStack() as opened, ThreadPoolExecutor(2) as pool:
        stores = [opened.enter_context(closing(Store(store_url))) for _ in range(2)]
        first, second = pool.map(starts, (A, B), stores)
    assert [a + b for a, b in zip(first, second, strict=True)] == [1] * rounds
    assert leases(store) == {"a": 0, "b": 0}


def test_starts_and_ends_on_one_host_lose_no_lease(store: Store, store_url: str) -> None:
    """A lease given back at the moment of another use stays."""
    store.add(one := disk("one"))

    def use(number: int) -> None:
        with closing(Store(store_url)) as opened:
            for step in range(20):
                domain = uuid.UUID(int=number * 1000 + step + 2)
                opened.hosts.start(A, domain, [one.id], READY)
                assert any(use.user_id == domain for use in opened.hosts.uses(A))
                with pytest.raises(DiskInUseError):
                    opened.hosts.work(B, one.id)
                opened.hosts.release(A, domain)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(4)))
    assert leases(store) == {"a": 0, "b": 0}


def test_a_start_and_a_fence_do_not_both_win(store: Store, store_url: str) -> None:
    """Either the start is refused, or its lease is taken back as well."""
    store.add(one := disk("one"))
    for number in range(20):
        make_silent(store_url, "a")
        barrier = Barrier(2)

        def start(barrier: Barrier = barrier, number: int = number) -> None:
            with closing(Store(store_url)) as opened:
                barrier.wait(30)
                with contextlib.suppress(HostFencedError):
                    opened.hosts.start(A, uuid.UUID(int=number + 2), [one.id], READY)

        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(start)
            barrier.wait(30)
            time.sleep(number / 2000)
            store.hosts.fence(store.hosts.get("a"))
            running.result(30)
        assert leases(store)["a"] == 0
        execute(store_url, "UPDATE hosts SET fenced = NULL")


def moving(store: Store) -> uuid.UUID:
    """A disk that a domain on host a uses, and whose lease host b awaits."""
    store.add(one := disk("one"))
    store.hosts.start(A, VM, [one.id], READY)
    assert store.hosts.await_handover(B, VM, [one.id], READY)
    return one.id


def test_a_lease_goes_to_the_host_that_awaits_the_domain(store: Store) -> None:
    disk_id = moving(store)
    assert leases(store) == {"a": 2, "b": 0}
    assert {(use.resource_id, use.is_awaited) for use in store.hosts.uses(B)} == {(VM, True), (disk_id, True)}
    with pytest.raises(DiskInUseError, match="in use on host 'a'"):
        store.hosts.start(B, VM, [disk_id], READY)
    store.hosts.release(A, VM)
    assert leases(store) == {"a": 0, "b": 2}
    assert {(use.user_id, use.is_awaited) for use in store.hosts.uses(B)} == {(VM, False)}
    with pytest.raises(DiskInUseError, match="in use on host 'b'"):
        store.hosts.start(A, VM, [disk_id], READY)
    store.hosts.release(A, VM)
    assert leases(store) == {"a": 0, "b": 2}
    store.hosts.release(B, VM)
    assert leases(store) == {"a": 0, "b": 0}


def test_a_failed_migration_leaves_the_lease_with_its_host(store: Store) -> None:
    disk_id = moving(store)
    store.hosts.release(B, VM)
    assert store.hosts.uses(B) == []
    assert leases(store) == {"a": 2, "b": 0}
    store.hosts.release(A, VM)
    store.hosts.start(B, VM, [disk_id], READY)


def test_nothing_else_uses_a_disk_that_is_about_to_migrate(store: Store) -> None:
    disk_id = moving(store)
    third = host("c")
    store.hosts.enter(third)
    for use in (
        lambda: store.hosts.work(A, disk_id),
        lambda: store.hosts.start(A, uuid.uuid4(), [disk_id], READY),
        lambda: store.hosts.await_handover(third, VM, [disk_id], READY),
    ):
        with pytest.raises(DiskInUseError, match="is about to migrate to host 'b'"):
            use()
    assert store.hosts.await_handover(B, VM, [disk_id], READY)  # a repeated migration
    assert store.hosts.start(A, VM, [disk_id], READY) == []  # the agent, of the running domain


def test_a_lease_is_awaited_of_the_domains_host_and_of_no_other_user(store: Store) -> None:
    store.add(one := disk("one"))
    store.add(two := disk("two"))
    with pytest.raises(DiskInUseError, match="no other host has the leases"):
        store.hosts.await_handover(B, VM, [one.id], READY)
    store.hosts.start(A, VM, [one.id], READY)
    for waiting, disk_ids in ((A, [one.id]), (B, [one.id, two.id])):
        with pytest.raises(DiskInUseError, match="no other host has the leases"):
            store.hosts.await_handover(waiting, VM, disk_ids, READY)
    with pytest.raises(DiskStateError):
        store.hosts.await_handover(B, VM, [one.id], [DiskState.COPYING])
    store.hosts.work(A, one.id)
    assert not store.hosts.await_handover(B, VM, [one.id], READY)
    assert store.hosts.uses(B) == []
    store.hosts.end_work(A, one.id)
    assert store.hosts.await_handover(B, VM, [one.id], READY)


def test_a_dead_source_hands_over_and_a_dead_destination_awaits_nothing(store: Store, store_url: str) -> None:
    disk_id = moving(store)
    make_silent(store_url, "a")
    assert store.hosts.fence(store.hosts.get("a")) == 2
    assert leases(store) == {"a": 0, "b": 2}
    store.hosts.enter(restarted(A))
    assert store.hosts.await_handover(restarted(A), VM, [disk_id], READY)
    store.hosts.enter(restarted(A))
    assert store.hosts.uses(A) == []
    assert store.hosts.await_handover(A, VM, [disk_id], READY)
    store.hosts.enter(restarted(B))
    assert leases(store) == {"a": 2, "b": 0}


def test_the_destination_takes_the_leases_of_disks_that_receive_content(store: Store) -> None:
    ours, theirs = disk("ours"), dataclasses.replace(disk("theirs"), state=DiskState.RECEIVING)
    for each in (ours, theirs):
        store.add(each)
    store.hosts.start(A, VM, [ours.id], READY)
    store.hosts.work(B, theirs.id)
    store.hosts.end_work(B, theirs.id)
    assert leases(store) == {"a": 2, "b": 1}  # the disk waits on host b
    with pytest.raises(DiskInUseError, match="in use on host 'b'"):
        store.hosts.work(A, theirs.id)
    with pytest.raises(DiskStateError):
        store.hosts.start(B, VM, [theirs.id], READY)
    assert store.hosts.await_handover(B, VM, [], READY, {ours.id: theirs.id})
    assert {(use.resource_id, use.user_id, use.is_awaited) for use in store.hosts.uses(B)} == {
        (VM, VM, True),
        (theirs.id, B.id, False),
        (theirs.id, VM, False),
    }
    store.hosts.release(B, VM)  # the migration fails
    assert leases(store) == {"a": 2, "b": 1}
    assert store.hosts.await_handover(B, VM, [], READY, {ours.id: theirs.id})
    store.hosts.release(A, VM)
    assert leases(store) == {"a": 0, "b": 2}
    store.set_received(theirs.id)
    store.hosts.end_work(B, theirs.id)
    assert {(use.resource_id, use.user_id) for use in store.hosts.uses(B)} == {(VM, VM), (theirs.id, VM)}
    with pytest.raises(DiskStateError):
        store.set_received(theirs.id)

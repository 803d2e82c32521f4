"""Races of hosts for a name, a path or the last free set: one wins, and the others get a named error."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Barrier

import pytest
import sqlalchemy as sa
from test_encryption_set_store import encryption_set
from test_store import disk

from support.stores import connected
from virt_sse.errors import (
    DiskExistsError,
    DiskStateError,
    EncryptionSetExistsError,
    EncryptionSetInUseError,
    EncryptionSetNotFoundError,
    PolicyError,
    ScaleSetExistsError,
)
from virt_sse.model.replacements import Replacement
from virt_sse.model.scale_sets import ScaleSet
from virt_sse.model.vms import Vm
from virt_sse.store.store import Store
from virt_sse.store.tables import disks, encryption_sets

RACERS = 6


def race(url: str, action: Callable[[Store, int], object]) -> list[type[Exception] | None]:
    """The exception of each of several hosts that run *action* at the same time."""
    barrier = Barrier(RACERS)
    with ExitStack() as opened, ThreadPoolExecutor(RACERS) as pool:
        stores = [opened.enter_context(closing(Store(url))) for _ in range(RACERS)]

        def run(number: int) -> type[Exception] | None:
            barrier.wait(30)
            try:
                action(stores[number], number)
            except Exception as exc:  # noqa: BLE001 -- the test compares
                return type(exc)
            return None

        return list(pool.map(run, range(RACERS)))


def assert_one_wins(outcomes: list[type[Exception] | None], error: type[Exception]) -> None:
    assert outcomes.count(None) == 1, outcomes
    assert outcomes.count(error) == RACERS - 1, outcomes


@pytest.mark.parametrize("taken", ["name", "path", "id"])
def test_one_disk_has_a_name_path_or_id(store_url: str, taken: str) -> None:
    first = disk("first")

    def add(store: Store, number: int) -> None:
        store.add(dataclasses.replace(disk(f"disk-{number}"), **{taken: getattr(first, taken)}))

    assert_one_wins(race(store_url, add), DiskExistsError)


def test_one_disk_moves_to_a_path(store_url: str) -> None:
    with closing(Store(store_url)) as store:
        for number in range(RACERS):
            store.add(disk(f"disk-{number}"))
    outcomes = race(
        store_url, lambda store, number: store.set_path(disk(f"disk-{number}").id, Path("/images/new"))
    )
    assert_one_wins(outcomes, DiskExistsError)


def test_a_reader_of_changed_paths_misses_none(store_url: str) -> None:
    """Whoever sees the number of a change sees all changes before; a number is never given out again."""
    known: dict[uuid.UUID, Path] = {}
    with closing(Store(store_url)) as reader, ThreadPoolExecutor(1) as pool:

        def change(store: Store, number: int) -> None:
            for step in range(5):
                store.add(one := disk(f"disk-{number}-{step}"))
                store.set_path(one.id, Path(f"/images/moved-{number}-{step}"))
                if step % 2:
                    store.remove(one.id)

        racing = pool.submit(race, store_url, change)
        last = -1
        while not racing.done():
            last, changed = reader.paths_since(last)
            known |= changed
        assert racing.result() == [None] * RACERS
        last, changed = reader.paths_since(last)
        known |= changed
        assert {each.id: each.path for each in reader.all()}.items() <= known.items()
        assert reader.paths_since(last) == (last, {})
        assert last <= RACERS * 5 * 2  # the last change may be of a removed disk
        reader.add(disk("next"))
        assert reader.paths_since(last)[0] == RACERS * 5 * 2 + 1


def test_one_set_has_a_name(store_url: str) -> None:
    def add(store: Store, number: int) -> None:
        store.encryption_sets.add(
            dataclasses.replace(encryption_set("web"), id=uuid.uuid4(), region=f"region-{number}"), limit=9
        )

    assert_one_wins(race(store_url, add), EncryptionSetExistsError)


def test_the_limit_of_sets_holds(store_url: str) -> None:
    def add(store: Store, number: int) -> None:
        store.encryption_sets.add(encryption_set(f"set-{number}"), limit=2)

    outcomes = race(store_url, add)
    assert (outcomes.count(None), outcomes.count(PolicyError)) == (2, RACERS - 2)


def test_one_scale_set_has_a_name(store_url: str) -> None:
    created = disk("any").created

    def add(store: Store, _: int) -> None:
        store.scale_sets.add(
            ScaleSet(
                id=uuid.uuid4(),
                name="web",
                definition="<domain/>",
                image_id=uuid.uuid4(),
                size=1,
                encryption_at_host=False,
                created=created,
            )
        )

    assert_one_wins(race(store_url, add), ScaleSetExistsError)


def test_one_copy_of_an_image_begins(store_url: str) -> None:
    def begin(store: Store, number: int) -> None:
        store.replacements.begin(
            Replacement(disk_id=uuid.uuid4(), name=f"n{number}", source_path=Path("/plain"), target="vda")
        )

    assert_one_wins(race(store_url, begin), DiskStateError)


def test_one_copy_of_a_disk_begins(store_url: str) -> None:
    with closing(Store(store_url)) as store:
        store.add(source := disk("source"))

    def begin(store: Store, _: int) -> None:
        copy = Replacement(disk_id=uuid.uuid4(), name="source", source_id=source.id, target="vda")
        store.replacements.begin(copy)

    assert_one_wins(race(store_url, begin), DiskStateError)


def test_a_vm_is_added_once(store_url: str) -> None:
    vm_id = uuid.uuid4()
    outcomes = race(store_url, lambda store, number: store.vms.put(Vm(vm_id, f"vm-{number}", uuid.uuid4())))
    assert outcomes == [None] * RACERS
    with closing(Store(store_url)) as store:
        assert [vm.id for vm in store.vms.all()] == [vm_id]


def test_a_set_is_kept_for_a_disk_that_another_host_adds(store_url: str) -> None:
    with closing(Store(store_url)) as store:
        store.encryption_sets.add(web := encryption_set("web"), limit=None)
        store.add(disk("new"))
        with ThreadPoolExecutor(1) as pool:
            with connected(store_url) as other:
                other.execute(disks.update().values(encryption_set_id=web.id))
                removal = pool.submit(store.encryption_sets.remove, web)
                with pytest.raises(TimeoutError):
                    removal.result(0.2)
            with pytest.raises(EncryptionSetInUseError, match="in disk encryption set 'web'"):
                removal.result(30)
        assert store.encryption_sets.get("web") == web


def test_a_disk_in_a_set_that_another_host_removes_is_refused(store_url: str) -> None:
    with closing(Store(store_url)) as store:
        store.encryption_sets.add(web := encryption_set("web"), limit=None)
        store.add(old := disk("old"))
        with connected(store_url) as other:
            other.execute(encryption_sets.delete())
        for action in (
            lambda: store.add(dataclasses.replace(disk("new"), set_id=web.id)),
            lambda: store.replace(old, dataclasses.replace(old, set_id=web.id, generation=2)),
        ):
            with pytest.raises(EncryptionSetNotFoundError, match="was deleted"):
                action()
        assert store.all() == [old]


def test_names_are_sorted_alike(store_url: str) -> None:
    names = ["B", "a", "b", "A_", "A-1", "A.1", "0"]
    with closing(Store(store_url)) as store:
        for name in names:
            store.add(disk(name))
            store.encryption_sets.add(encryption_set(name), limit=None)
        assert [each.name for each in store.all()] == sorted(names)
        assert [each.name for each in store.encryption_sets.all()] == sorted(names)
    with connected(store_url) as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(disks)) == len(names)

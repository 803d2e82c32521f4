"""Commands for many disks: a fixed number of queries, and images opened only where an image is needed."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Engine

from support import images
from virt_sse.backend import Backend
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskState, NewDisk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import envelope_slots, image_file, img, unlocking

M = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "cryptsetup")


@pytest.fixture
def web(backend: Backend) -> EncryptionSet:
    return backend.sets.create(
        "web",
        provider=PLATFORM_KEY.provider,
        key=PLATFORM_KEY.name,
        encryption_type=EncryptionType.CUSTOMER_KEY,
    )


def made(backend: Backend, web: EncryptionSet, name: str) -> Disk:
    return backend.disks.create(NewDisk(name=name, size=M, encryption_set=web.name))


def copies(backend: Backend, disk: Disk, count: int) -> None:
    """Add disks without images to the store, under the same version of the same key."""
    for number in range(count):
        backend.host.store.add(
            Disk(
                id=uuid.uuid4(),
                name=f"{disk.name}-{number}",
                path=disk.path.with_name(f"{disk.name}-{number}"),
                format=disk.format,
                size=disk.size,
                state=DiskState.READY,
                encryption_type=disk.encryption_type,
                created=disk.created,
                generation=disk.generation,
                deks=disk.deks,
                set_id=disk.set_id,
            )
        )


@contextlib.contextmanager
def statements() -> Iterator[list[str]]:
    """The SQL statements executed in the block."""
    executed: list[str] = []

    def note(*arguments: object) -> None:
        executed.append(str(arguments[2]))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield executed
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@contextlib.contextmanager
def no_image_opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("an image is opened")

    with monkeypatch.context() as patched:
        for module in (image_file, img, unlocking, envelope_slots):
            patched.setattr(module, "opened", opened)
        yield


def test_a_listing_opens_no_image_and_asks_the_store_once(
    backend: Backend, web: EncryptionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies(backend, made(backend, web, "disk"), 5)
    with no_image_opened(monkeypatch), statements() as executed:
        assert len(backend.disks.all()) == 6
    assert len(executed) == 1


def test_the_sizes_of_all_sets_are_one_query(backend: Backend, web: EncryptionSet) -> None:
    copies(backend, made(backend, web, "disk"), 3)
    backend.disks.create(NewDisk(name="platform", size=M))
    with statements() as executed:
        assert backend.sets.sizes() == {web.id: 4}
    assert len(executed) == 1


def test_a_rotation_with_nothing_to_do_costs_the_same_for_any_number_of_disks(
    backend: Backend, web: EncryptionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = made(backend, web, "disk")
    counts = []
    with no_image_opened(monkeypatch):
        for more in (0, 20):
            copies(backend, disk, more)
            with statements() as executed:
                report = backend.sets.rotate("web")
            assert (report.rewrapped, report.current, report.failed) == (0, 1 + more, {})
            counts.append(len(executed))
    assert counts[0] == counts[1] <= 4


def test_the_next_rotation_looks_again_at_an_image_that_was_away(
    backend: Backend, web: EncryptionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = made(backend, web, "disk")
    aside = disk.path.with_name("aside")
    disk.path.rename(aside)
    _, report = backend.keys.rotate(PLATFORM_KEY)
    assert list(report.failed) == ["disk"]
    assert list(backend.sets.rotate("web").failed) == ["disk"]  # the mark stays until the image is written
    aside.rename(disk.path)
    report = backend.sets.rotate("web")
    assert (report.rewrapped, report.current, report.failed) == (1, 0, {})
    backend.disks.check("disk")
    with no_image_opened(monkeypatch):
        assert backend.sets.rotate("web").current == 1


def test_a_rotation_of_every_image_finds_an_older_copy(backend: Backend, web: EncryptionSet) -> None:
    disk = made(backend, web, "disk")
    older = disk.path.read_bytes()
    backend.keys.rotate(PLATFORM_KEY)
    disk.path.write_bytes(older)
    assert backend.sets.rotate("web").current == 1
    assert "an older copy of the image" in backend.sets.rotate("web", every_image=True).failed["disk"]
    backend.disks.trust("disk")
    with image_file.opened(disk.path) as descriptor:
        assert envelope_slots.read(descriptor, disk.format).generation == 2


def test_the_disks_of_a_set_are_found_by_an_index(root: Path, backend: Backend, web: EncryptionSet) -> None:
    engine = sa.create_engine(f"sqlite:///{root}/var/lib/virt-sse/store.sqlite")
    with engine.connect() as connection:
        plan = connection.exec_driver_sql(
            "EXPLAIN QUERY PLAN SELECT name FROM disks WHERE encryption_set_id = ?", (web.id.hex,)
        )
        assert "disks_by_encryption_set" in str(list(plan))
    engine.dispose()


def test_a_name_like_another_disks_id_names_its_own_disk(backend: Backend, web: EncryptionSet) -> None:
    other = made(backend, web, "other")
    named = made(backend, web, str(other.id))
    assert backend.host.store.get(str(other.id)) == named
    assert backend.host.store.get(str(named.id)) == named

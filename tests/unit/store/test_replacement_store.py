"""Copies in the store: each step changes the record and both disks in one transaction."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from virt_sse.domains.replacement_outcome import settle_ended
from virt_sse.errors import DiskInUseError, DiskStateError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.layers import EncryptionType
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.store.store import Store
from virt_sse.system.locks import DiskLocks

OLD, NEW = uuid.UUID(int=1), uuid.UUID(int=2)
COPY = Replacement(
    disk_id=NEW,
    name="web",
    source_id=OLD,
    domain_id=uuid.UUID(int=3),
    target="vda",
    is_detached=True,
    max_rate=9,
)


def disk(disk_id: uuid.UUID, name: str, state: DiskState = DiskState.READY) -> Disk:
    return Disk(
        id=disk_id,
        name=name,
        path=Path("/images", name),
        format=DiskFormat.RAW,
        size=512,
        state=state,
        encryption_type=EncryptionType.PLATFORM_KEY,
        created=datetime(2026, 1, 31, 12, tzinfo=UTC),
        generation=1,
        deks=(),
        serial="0123456789" if disk_id == NEW else None,
    )


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = Store(store_url)
    opened.add(disk(OLD, "web"))
    opened.replacements.begin(COPY)
    opened.add(disk(NEW, "web.copy-1"))
    opened.replacements.reserve(COPY)
    yield opened
    opened.close()


def states(store: Store) -> dict[str, DiskState]:
    return {each.name: each.state for each in store.all()}


def test_a_copy_reserves_both_disks(store: Store) -> None:
    assert store.replacements.all() == [COPY]
    assert store.replacements.find(OLD) == store.replacements.find(NEW) == COPY
    assert states(store) == {"web": DiskState.COPYING, "web.copy-1": DiskState.COPYING}
    assert {each.id for each in store.unfinished()} == {OLD, NEW}
    with pytest.raises(DiskStateError, match="is not ready"):
        store.replacements.begin(COPY)
    assert store.get("web.copy-1").guest_serial == "0123456789"


def test_the_new_disk_takes_over(store: Store) -> None:
    store.replacements.take_over(COPY)
    assert states(store) == {"web": DiskState.READY, str(OLD): DiskState.DELETING}
    assert store.get("web").id == NEW
    (found,) = store.replacements.all()
    assert found.state is ReplacementState.DONE


def test_an_abandoned_copy_leaves_the_source(store: Store) -> None:
    store.replacements.cancel(COPY)
    (found,) = store.replacements.all()
    assert found.is_cancelled
    store.replacements.abandon(found)
    assert states(store) == {"web": DiskState.READY, "web.copy-1": DiskState.DELETING}
    assert store.replacements.all() == []


def test_an_image_has_one_copy_at_a_time(store: Store) -> None:
    plain = Replacement(
        disk_id=uuid.uuid4(), name="a", source_path=Path("/plain"), source_identity=(1, 2), target="vda"
    )
    store.replacements.begin(plain)
    assert store.replacements.find(plain.disk_id) == plain
    again = Replacement(disk_id=uuid.uuid4(), name="b", source_path=Path("/plain"), target="vda")
    with pytest.raises(DiskStateError, match="being copied already"):
        store.replacements.begin(again)
    store.replacements.set_state(plain, ReplacementState.KEPT)
    store.replacements.begin(again)
    assert store.replacements.find(plain.disk_id) is None


@pytest.mark.parametrize("has", [OLD, NEW])
def test_the_definition_of_an_ended_domain_decides(store: Store, tmp_path: Path, has: uuid.UUID) -> None:
    locks = DiskLocks(tmp_path / "locks")
    other = NEW if has == OLD else OLD
    encryption = (
        "<encryption format='luks'><secret type='passphrase' usage='virt-sse:{}:service'/></encryption>"
    )
    definition = DomainDefinition.parse(
        f"<domain><devices><disk><source file='/a'>{encryption.format(has)}</source><target dev='vda'/>"
        f"<mirror job='copy'><source file='/b'>{encryption.format(other)}</source></mirror>"
        f"</disk></devices></domain>"
    )
    with locks.hold(OLD), pytest.raises(DiskInUseError):
        settle_ended(store, locks, definition)
    settle_ended(store, locks, definition)
    assert store.get("web").id == has
    assert store.get("web").state is DiskState.READY

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from test_store import disk

from virt_sse.errors import (
    EncryptionSetExistsError,
    EncryptionSetInUseError,
    EncryptionSetNotFoundError,
    PolicyError,
)
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import EncryptionType
from virt_sse.store.store import Store


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
    yield store
    store.close()


def encryption_set(name: str, *, region: str = "here") -> EncryptionSet:
    return EncryptionSet(
        id=uuid.uuid5(uuid.NAMESPACE_OID, name),
        name=name,
        key=KeyRef("customer-managed", "https://vault.example/keys/web"),
        key_version=None,
        encryption_type=EncryptionType.CUSTOMER_KEY,
        automatic_rotation=True,
        subscription="ours",
        region=region,
        tenant="tenant",
        identity="client",
        revocation=RevocationAction.SHUTDOWN,
        grace_seconds=60,
        created=datetime(2026, 1, 31, 12, tzinfo=UTC),
    )


def test_a_set_comes_back_as_it_was(store: Store) -> None:
    store.encryption_sets.add(web := encryption_set("web"), limit=1)
    assert store.encryption_sets.get("web") == store.encryption_sets.get(str(web.id)) == web
    assert store.encryption_sets.all() == [web]
    changed = dataclasses.replace(web, key_version="1", identity=None, grace_seconds=0)
    store.encryption_sets.update(changed)
    assert store.encryption_sets.get("web") == changed
    store.encryption_sets.remove(web)
    with pytest.raises(EncryptionSetNotFoundError):
        store.encryption_sets.get("web")
    with pytest.raises(EncryptionSetNotFoundError):
        store.encryption_sets.update(changed)


def test_names_are_taken_once(store: Store) -> None:
    store.encryption_sets.add(encryption_set("web"), limit=9)
    with pytest.raises(EncryptionSetExistsError, match="'web' exists"):
        store.encryption_sets.add(dataclasses.replace(encryption_set("web"), id=uuid.uuid4()), limit=9)


def test_a_region_of_a_subscription_holds_a_limited_number_of_sets(store: Store) -> None:
    for number in range(50):
        store.encryption_sets.add(encryption_set(f"set-{number}"), limit=50)
    with pytest.raises(PolicyError, match="has 50 disk encryption sets"):
        store.encryption_sets.add(encryption_set("one-more"), limit=50)
    store.encryption_sets.add(encryption_set("one-more", region="elsewhere"), limit=50)


def test_a_set_with_a_disk_is_kept(store: Store) -> None:
    store.encryption_sets.add(web := encryption_set("web"), limit=1)
    store.add(dataclasses.replace(disk("one"), set_id=web.id))
    store.add(disk("two"))
    assert [found.name for found in store.in_set(web.id)] == ["one"]
    with pytest.raises(EncryptionSetInUseError, match="'one' is in disk encryption set 'web'"):
        store.encryption_sets.remove(web)

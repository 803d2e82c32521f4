from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.customer_managed_uses import SHORT, Open
from support.keyrings import open_provider
from support.strange_vaults import Listener, StrangeVault
from virt_sse.model.keys import ProviderConfig
from virt_sse_plugins.key_providers.customer_managed import CustomerManagedKeyProvider
from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "platform-managed"


@pytest.fixture
def provider(directory: Path) -> PlatformManagedKeyProvider:
    provider = open_provider(directory)
    assert provider.provision()
    return provider


@pytest.fixture
def strange_vault(tmp_path: Path) -> Iterator[StrangeVault]:
    with StrangeVault(tmp_path) as vault:
        yield vault


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as listener:
        yield listener


@pytest.fixture
def open_customer_managed(tmp_path: Path) -> Iterator[Open]:
    opened = []

    def open_one(identity: Path | None = None, **options: object) -> CustomerManagedKeyProvider:
        config = ProviderConfig(tmp_path / "own", options, identity)
        opened.append(CustomerManagedKeyProvider.from_config(config))
        return opened[-1]

    yield open_one
    for provider in opened:
        provider.close()


@pytest.fixture
def customer_managed(strange_vault: StrangeVault, open_customer_managed: Open) -> CustomerManagedKeyProvider:
    """A provider with an identity for the strange vault, and with time limits short enough for tests."""
    return open_customer_managed(strange_vault.credential_file(), **SHORT)

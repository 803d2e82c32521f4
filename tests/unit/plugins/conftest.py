from __future__ import annotations

from pathlib import Path

import pytest
from keyrings import open_provider

from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "platform-managed"


@pytest.fixture
def provider(directory: Path) -> PlatformManagedKeyProvider:
    provider = open_provider(directory)
    assert provider.provision()
    return provider

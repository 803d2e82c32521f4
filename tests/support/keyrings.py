"""Keyrings of the platform-managed provider, for its tests."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from virt_sse.model.keys import Dek, DekContext, ProviderConfig, WrappedDek
from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider

CONTEXT = DekContext(UUID(int=1), "service")


def open_provider(directory: Path) -> PlatformManagedKeyProvider:
    return PlatformManagedKeyProvider.from_config(ProviderConfig(directory))


def wrap(provider: PlatformManagedKeyProvider, dek: Dek) -> WrappedDek:
    return provider.wrap(dek, provider.current_key("default"), context=CONTEXT)


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}

"""The contract suite: what virt-sse relies on in every key provider, as tests that any plugin can run.

``pytest --pyargs virt_sse.contract`` runs the suite against the provider that the fixture
``key_provider_bench`` describes. A plugin's project overrides the fixture in the ``conftest.py`` of its top
folder, and returns a :class:`KeyProviderBench`; a parametrized fixture tests several providers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from virt_sse.model.keys import KeyId


@dataclass(frozen=True, kw_only=True)
class KeyProviderBench:
    """A key provider under test, and the administration of its keys from outside of the provider.

    :ivar provider: the registered name of the provider.
    :ivar key: the name of an existing key.
    :ivar rotate: makes a new version current, as the key's administrator would.
    :ivar disable: disables a version, likewise; ``None`` if versions cannot be disabled.
    :ivar enable: enables the version again.
    :ivar options: the provider's table of the configuration.
    :ivar identity: the credential file that the provider authenticates with, if the provider acts for a disk
        encryption set.
    :ivar secrets: key material and credentials that must never show.
    """

    provider: str
    key: str
    rotate: Callable[[], object]
    disable: Callable[[KeyId], None] | None = None
    enable: Callable[[KeyId], None] | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    identity: Path | None = None
    secrets: tuple[bytes, ...] = field(default=(), repr=False)

"""For each key provider: how to set up a real one, and how its keys are governed from outside.

Every registered key provider needs an entry in :data:`BENCHES`; the contract suite fails without.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virt_sse.contract import KeyProviderBench
from virt_sse.lab.tokens import LabToken
from virt_sse.model.keys import KeyId, ProviderConfig
from virt_sse.pkcs11.token import KeyKind
from virt_sse.pkcs11.versions import VersionedKeys
from virt_sse.vault_client.permissions import USE, Permission
from virt_sse_plugins.key_providers.platform_keyring import DEFAULT_KEY
from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider

Fixture = Callable[[str], Any]
"""Gives pytest's fixture of that name."""


@contextmanager
def _customer_managed(directory: Path, fixture: Fixture) -> Iterator[KeyProviderBench]:
    from support.customer_keys import CustomerKeys

    with CustomerKeys(fixture("lab_vault"), directory) as keys:
        identity = keys.new_identity(*USE, Permission.GET, Permission.ROTATE)
        name = keys.new_key()
        yield KeyProviderBench(
            provider="customer-managed",
            key=name,
            rotate=lambda: keys.rotate(name),
            disable=lambda key: keys.enable(key, enabled=False),
            enable=lambda key: keys.enable(key, enabled=True),
            identity=identity,
            secrets=(keys.private_key_of(identity),),
        )


@dataclass(frozen=True)
class AdministeredToken:
    """A token that many tests share, and its administrator with a separate session."""

    token: LabToken
    keys: VersionedKeys

    @classmethod
    @contextmanager
    def open(cls, token: LabToken) -> Iterator[AdministeredToken]:
        with closing(token.open()) as opened:
            yield cls(token, VersionedKeys(opened))


@contextmanager
def _hsm_simulated(administered: AdministeredToken, kind: KeyKind) -> Iterator[KeyProviderBench]:
    """Make a key with a name of its own in the token."""
    administrator = administered.keys
    name = f"contract-{secrets.token_hex(8)}"
    administrator.create(name, kind, 2048)

    def set_enabled(key: KeyId, enabled: bool) -> None:
        administrator.token.set_enabled(administrator.get(key.name, key.version), enabled)

    yield KeyProviderBench(
        provider="hsm-simulated",
        key=name,
        rotate=lambda: administrator.rotate(name),
        disable=lambda key: set_enabled(key, False),
        enable=lambda key: set_enabled(key, True),
        options=administered.token.options,
        secrets=(administered.token.pin.encode(),),
    )


@contextmanager
def _vault_transit(directory: Path, fixture: Fixture) -> Iterator[KeyProviderBench]:
    from support.transit_keys import ROTATION, RULES, TransitKeys

    with TransitKeys(fixture("lab_openbao"), directory) as keys:
        key = keys.new_key(rules=RULES + ROTATION)
        yield KeyProviderBench(
            provider="vault-transit",
            key=key,
            rotate=lambda: keys.rotate(key),
            disable=lambda used: keys.disable_before(key, int(used.version) + 1),
            enable=lambda _: keys.configure(key, min_decryption_version=1),
            options=keys.options(),
            secrets=(keys.secret_id.encode(),),
        )


@contextmanager
def _platform_managed(directory: Path, _fixture: Fixture) -> Iterator[KeyProviderBench]:
    administrator = PlatformManagedKeyProvider.from_config(ProviderConfig(directory))
    assert administrator.provision()
    yield KeyProviderBench(
        provider="platform-managed",
        key=DEFAULT_KEY,
        rotate=lambda: administrator.rotate(DEFAULT_KEY),
        disable=administrator.disable,
        enable=administrator.enable,
        secrets=((directory / "root.key").read_bytes(),),
    )


BENCHES: Mapping[str, Callable[[Path, Fixture], AbstractContextManager[KeyProviderBench]]] = {
    "customer-managed": _customer_managed,
    "hsm-simulated": lambda _folder, fixture: _hsm_simulated(fixture("softhsm"), KeyKind.RSA),
    "hsm-simulated, AES": lambda _folder, fixture: _hsm_simulated(fixture("softhsm"), KeyKind.AES),
    "hsm-simulated, NSS": lambda _folder, fixture: _hsm_simulated(fixture("nss"), KeyKind.RSA),
    "platform-managed": _platform_managed,
    "vault-transit": _vault_transit,
}
"""By name, and after a comma what sets one bench of a provider apart from its others.

Each is given the provider's own folder, which does not exist yet, and pytest's fixtures.
"""

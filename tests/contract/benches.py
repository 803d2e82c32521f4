"""For each key provider: how to set up a real one, and how its keys are governed from outside.

Every registered key provider needs an entry in :data:`BENCHES`; the contract suite fails without.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virt_sse.lab.tokens import LabToken
from virt_sse.model.keys import KeyId, ProviderConfig
from virt_sse.pkcs11.token import KeyKind
from virt_sse.pkcs11.versions import VersionedKeys
from virt_sse.vault_client.permissions import USE, Permission
from virt_sse_plugins.key_providers.platform_keyring import DEFAULT_KEY
from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider

Fixture = Callable[[str], Any]
"""Gives pytest's fixture of that name."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A place where a provider's keys live.

    :ivar key: the name of a key that is there.
    :ivar rotate: makes a new version current, as the key's administrator would, from outside the provider
        under test.
    :ivar disable: disables a version, likewise; ``None`` where versions cannot be disabled.
    :ivar enable: enables it again.
    :ivar options: the provider's table of the configuration.
    :ivar identity: the credential file of whom the provider acts as, if it acts for a disk encryption set.
    :ivar secrets: key material and credentials that must never show.
    """

    key: str
    rotate: Callable[[], object]
    disable: Callable[[KeyId], None] | None = None
    enable: Callable[[KeyId], None] | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    identity: Path | None = None
    secrets: tuple[bytes, ...] = ()


@contextmanager
def _customer_managed(directory: Path, fixture: Fixture) -> Iterator[Bench]:
    from support.customer_keys import CustomerKeys

    with CustomerKeys(fixture("lab_vault"), directory) as keys:
        identity = keys.new_identity(*USE, Permission.GET, Permission.ROTATE)
        name = keys.new_key()
        yield Bench(
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
def _hsm_simulated(administered: AdministeredToken, kind: KeyKind) -> Iterator[Bench]:
    """Make a key with a name of its own in the token."""
    administrator = administered.keys
    name = f"contract-{secrets.token_hex(8)}"
    administrator.create(name, kind, 2048)

    def set_enabled(key: KeyId, enabled: bool) -> None:
        administrator.token.set_enabled(administrator.get(key.name, key.version), enabled)

    yield Bench(
        key=name,
        rotate=lambda: administrator.rotate(name),
        disable=lambda key: set_enabled(key, False),
        enable=lambda key: set_enabled(key, True),
        options=administered.token.options,
        secrets=(administered.token.pin.encode(),),
    )


@contextmanager
def _vault_transit(directory: Path, fixture: Fixture) -> Iterator[Bench]:
    from support.transit_keys import ROTATION, RULES, TransitKeys

    with TransitKeys(fixture("lab_openbao"), directory) as keys:
        key = keys.new_key(rules=RULES + ROTATION)
        yield Bench(
            key=key,
            rotate=lambda: keys.rotate(key),
            disable=lambda used: keys.disable_before(key, int(used.version) + 1),
            enable=lambda _: keys.configure(key, min_decryption_version=1),
            options=keys.options(),
            secrets=(keys.secret_id.encode(),),
        )


@contextmanager
def _platform_managed(directory: Path, _fixture: Fixture) -> Iterator[Bench]:
    administrator = PlatformManagedKeyProvider.from_config(ProviderConfig(directory))
    assert administrator.provision()
    yield Bench(
        key=DEFAULT_KEY,
        rotate=lambda: administrator.rotate(DEFAULT_KEY),
        disable=administrator.disable,
        enable=administrator.enable,
        secrets=((directory / "root.key").read_bytes(),),
    )


@contextmanager
def _kek_file(directory: Path, _fixture: Fixture) -> Iterator[Bench]:
    directory.mkdir(parents=True)

    def add_version() -> None:
        version = len(list(directory.iterdir())) + 1
        (directory / f"default.{version}").write_bytes(secrets.token_bytes(32))

    add_version()
    yield Bench(
        key="default",
        rotate=add_version,
        options={"folder": str(directory)},
        secrets=((directory / "default.1").read_bytes(),),
    )


BENCHES: Mapping[str, Callable[[Path, Fixture], AbstractContextManager[Bench]]] = {
    "customer-managed": _customer_managed,
    "hsm-simulated": lambda _folder, fixture: _hsm_simulated(fixture("softhsm"), KeyKind.RSA),
    "hsm-simulated, AES": lambda _folder, fixture: _hsm_simulated(fixture("softhsm"), KeyKind.AES),
    "hsm-simulated, NSS": lambda _folder, fixture: _hsm_simulated(fixture("nss"), KeyKind.RSA),
    "kek-file": _kek_file,
    "platform-managed": _platform_managed,
    "vault-transit": _vault_transit,
}
"""By name, and after a comma what sets one bench of a provider apart from its others.

Each is given the provider's own folder, which does not exist yet, and pytest's fixtures.
"""

"""Built-in key providers of virt-sse."""

from __future__ import annotations

from virt_sse.api import KeyProvider, RegisterKeyProvider, hookimpl


def _platform_managed() -> type[KeyProvider]:
    from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider

    return PlatformManagedKeyProvider


def _customer_managed() -> type[KeyProvider]:
    from virt_sse_plugins.key_providers.customer_managed import CustomerManagedKeyProvider

    return CustomerManagedKeyProvider


def _hsm_simulated() -> type[KeyProvider]:
    from virt_sse import pkcs11

    pkcs11.require()
    from virt_sse_plugins.key_providers.hsm_simulated import HsmSimulatedKeyProvider

    return HsmSimulatedKeyProvider


def _vault_transit() -> type[KeyProvider]:
    from virt_sse_plugins.key_providers.vault_transit import VaultTransitKeyProvider

    return VaultTransitKeyProvider


@hookimpl
def virt_sse_register_key_providers(register: RegisterKeyProvider) -> None:
    register("platform-managed", _platform_managed)
    register("customer-managed", _customer_managed)
    register("hsm-simulated", _hsm_simulated)
    register("vault-transit", _vault_transit)

"""A key vault with several addresses."""

from __future__ import annotations

from collections.abc import Mapping

from virt_sse.vault_client.addresses import VaultAddresses
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey
from virt_sse_plugins.key_providers.key_vault import MOST_ANSWERS, KeyVault
from virt_sse_plugins.key_providers.key_vault_access import Access


class AddressedKeyVault:
    """One vault, asked at the first of its addresses that answers. Thread-safe.

    :param addresses: the vault's; *access* covers the vault.
    :param connection_timeout: in seconds, for each address.
    :param read_timeout: in seconds; a request takes at most three times as long, at all addresses together.
    """

    def __init__(
        self,
        addresses: VaultAddresses,
        access: Access,
        *,
        connection_timeout: float,
        read_timeout: float,
    ) -> None:
        self._addresses = addresses
        self._timeout = MOST_ANSWERS * read_timeout
        self._vaults = {
            url: KeyVault(url, access, connection_timeout=connection_timeout, read_timeout=read_timeout)
            for url in addresses.urls
        }

    def ask(
        self,
        what: str,
        key: KeyVaultKey,
        method: str,
        operation: str = "",
        *,
        body: Mapping[str, str] | None = None,
        headers: Mapping[str, str],
        repeatable: bool = True,
    ) -> Mapping[str, object]:
        """Send one request about *key*, as :meth:`KeyVault.ask`."""

        def ask(url: str) -> Mapping[str, object]:
            return self._vaults[url].ask(
                what, key, method, operation, body=body, headers=headers, repeatable=repeatable
            )

        return self._addresses.first_answer(ask, timeout=self._timeout, repeatable=repeatable)

    def close(self) -> None:
        """Close all connections."""
        for vault in self._vaults.values():
            vault.close()

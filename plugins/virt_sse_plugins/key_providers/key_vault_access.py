"""Identities of the customer-managed provider, and the vaults each identity is restricted to."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol
from urllib.parse import urlsplit

from virt_sse.api import KeyProviderUnavailableError, VirtSseError

if TYPE_CHECKING:
    from azure.core.credentials import AccessToken
    from azure.identity import DefaultAzureCredential, ManagedIdentityCredential

    from virt_sse.vault_client.addresses import VaultAddresses
    from virt_sse.vault_client.credential import VaultCredential

AZURE_DOMAINS = (
    "vault.azure.net",
    "vault.azure.cn",
    "vault.usgovcloudapi.net",
    "managedhsm.azure.net",
    "managedhsm.azure.cn",
    "managedhsm.usgovcloudapi.net",
)
"""Parent domains of Azure's own vaults."""


class Credential(Protocol):
    """The SDK's protocol for sources of tokens."""

    def get_token(
        self, *scopes: str, claims: str | None = None, tenant_id: str | None = None, **options: object
    ) -> AccessToken: ...


class Access(ABC):
    """One identity. Safe to share between threads.

    :cvar follows_environment: whether proxies and authorities from environment variables are used.
    """

    follows_environment: ClassVar[bool]

    @abstractmethod
    def who(self) -> str:
        """Description of the identity, for messages.

        :raise KeyProviderUnavailableError: When the identity's credential cannot be read.
        """

    @abstractmethod
    def covers(self, vault_url: str) -> bool:
        """Whether this identity is meant for the vault. Nothing is ever sent to any other vault.

        :raise KeyProviderUnavailableError: When the identity's credential cannot be read.
        """

    @abstractmethod
    def hint(self) -> str:
        """Hint for an error about a vault which this identity does not cover."""

    @abstractmethod
    def credential(self, vault_url: str) -> Credential:
        """Source of tokens for a vault covered by this identity."""

    def addresses(self, vault_url: str) -> VaultAddresses:
        """The addresses of a vault covered by this identity; by default, its URL."""
        from virt_sse.vault_client.addresses import VaultAddresses

        return VaultAddresses((vault_url,))

    @abstractmethod
    def authorities(self) -> str | bool:
        """Path of the trusted certificates; ``True`` for the system's."""

    def renew(self) -> bool:
        """Request a new token at the next use; false if not supported."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Release tokens and connections."""


class CredentialFileAccess(Access):
    """The identity in a credential file, restricted to the file's own vault.

    The file is read at first use, and again after each failure to read.

    :param timeout: time limit for a token of the vault, in seconds.
    :param addresses: the addresses of vaults, by the vaults' URLs; a vault without an entry is at its URL.
    """

    follows_environment = False

    def __init__(
        self, path: Path, *, timeout: float, addresses: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        self._path = path
        self._timeout = timeout
        self._configured = addresses or {}
        self._addresses: dict[tuple[str, str, int], VaultAddresses] = {}
        self._lock = threading.RLock()
        self._opened: VaultCredential | None = None

    def who(self) -> str:
        return f"principal {self._open().file.client_id}"

    def covers(self, vault_url: str) -> bool:
        return self._open().covers(vault_url)

    def hint(self) -> str:
        return f"the credential file {self._path} is restricted to {self._open().file.vault_url}"

    def credential(self, vault_url: str) -> Credential:
        return _FileTokens(self._open())

    def addresses(self, vault_url: str) -> VaultAddresses:
        from virt_sse.vault_client.addresses import VaultAddresses
        from virt_sse.vault_client.exchange import origin

        place = origin(vault_url)
        with self._lock:
            if place not in self._addresses:
                configured = [urls for url, urls in self._configured.items() if origin(url) == place]
                self._addresses[place] = VaultAddresses(configured[0] if configured else (vault_url,))
            return self._addresses[place]

    def authorities(self) -> str | bool:
        return self._open().ca_file()

    def renew(self) -> bool:
        self._open().forget()
        return True

    def close(self) -> None:
        with self._lock:
            if self._opened is not None:
                self._opened.close()

    def _open(self) -> VaultCredential:
        with self._lock:
            if self._opened is None:
                from virt_sse.vault_client.credential import VaultCredential

                try:
                    self._opened = VaultCredential(
                        self._path, timeout=self._timeout, addresses=self.addresses
                    )
                except VirtSseError as exc:  # a local problem, not a verdict of the vault about the key
                    raise KeyProviderUnavailableError(str(exc), hint=exc.hint) from exc
            return self._opened


class _FileTokens:
    """Tokens for the file's own audience and tenant, regardless of a server's challenge."""

    def __init__(self, credential: VaultCredential) -> None:
        self._credential = credential

    def get_token(
        self, *scopes: str, claims: str | None = None, tenant_id: str | None = None, **options: object
    ) -> AccessToken:
        return self._credential.get_token(f"{self._credential.file.audience}/.default")


class AzureAccess(Access):
    """An identity with tokens from azure-identity.

    A failure to get a token says nothing about the key: azure-identity's errors do not distinguish a deleted
    identity from a host without identity.

    :param who: description of the identity.
    :param make: makes the credential, at first use.
    :param hosts: ``HOST`` or ``HOST:PORT`` of the covered vaults; empty for Azure's own vaults.
    :param authority: path of the trusted certificates for the vaults; ``None`` for the system's.
    """

    follows_environment = True

    def __init__(
        self,
        who: str,
        make: Callable[[], ManagedIdentityCredential | DefaultAzureCredential],
        *,
        hosts: Collection[str],
        authority: Path | None,
    ) -> None:
        self._who = who
        self._make = make
        self._hosts = frozenset(host.lower().removesuffix(":443") for host in hosts)
        self._authority = authority
        self._lock = threading.Lock()
        self._made: ManagedIdentityCredential | DefaultAzureCredential | None = None

    def who(self) -> str:
        return self._who

    def covers(self, vault_url: str) -> bool:
        host = urlsplit(vault_url).netloc
        if self._hosts:
            return host in self._hosts
        return any(host.endswith(f".{domain}") for domain in AZURE_DOMAINS)

    def hint(self) -> str:
        if self._hosts:
            return "the option 'hosts' does not name this key vault"
        return "a key vault other than Azure's must be named in the option 'hosts'"

    def credential(self, vault_url: str) -> Credential:
        with self._lock:
            if self._made is None:
                self._made = self._make()
        return _AzureTokens(self._made, urlsplit(vault_url).hostname or "")

    def authorities(self) -> str | bool:
        return str(self._authority) if self._authority is not None else True

    def close(self) -> None:
        with self._lock:
            if self._made is not None:
                self._made.close()


class _AzureTokens:
    """Tokens for the resource named by a vault, if the vault's host is or is below the resource's host."""

    def __init__(
        self, credential: ManagedIdentityCredential | DefaultAzureCredential, vault_host: str
    ) -> None:
        self._credential = credential
        self._vault_host = vault_host

    def get_token(
        self, *scopes: str, claims: str | None = None, tenant_id: str | None = None, **options: object
    ) -> AccessToken:
        for scope in scopes:
            host = urlsplit(scope).hostname
            if not host or (host != self._vault_host and not self._vault_host.endswith(f".{host}")):
                raise KeyProviderUnavailableError(
                    f"the key vault {self._vault_host} requests a token for a different resource"
                )
        try:
            return self._credential.get_token(*scopes, claims=claims, tenant_id=tenant_id)
        except Exception as exc:
            reason = " ".join(str(exc).split())[:300].rstrip(".")
            raise KeyProviderUnavailableError(f"no token for the key vault: {reason}") from exc

"""As whom the customer-managed provider speaks to key vaults, and to which ones alone."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol
from urllib.parse import urlsplit

from virt_sse.api import KeyProviderUnavailableError, VirtSseError

if TYPE_CHECKING:
    from azure.core.credentials import AccessToken
    from azure.identity import DefaultAzureCredential, ManagedIdentityCredential

    from virt_sse.vault_client.credential import VaultCredential

AZURE_DOMAINS = (
    "vault.azure.net",
    "vault.azure.cn",
    "vault.usgovcloudapi.net",
    "managedhsm.azure.net",
    "managedhsm.azure.cn",
    "managedhsm.usgovcloudapi.net",
)
"""Under which Azure's own vaults lie."""


class Credential(Protocol):
    """What the SDK's clients ask for tokens."""

    def get_token(
        self, *scopes: str, claims: str | None = None, tenant_id: str | None = None, **options: object
    ) -> AccessToken: ...


class Access(ABC):
    """One identity. Threads may share one.

    :cvar follows_environment: whether proxies and authorities that the environment names are used.
    """

    follows_environment: ClassVar[bool]

    @abstractmethod
    def who(self) -> str:
        """The identity, for a hint to the one who grants.

        :raise KeyProviderUnavailableError: When the identity's credential cannot be read.
        """

    @abstractmethod
    def covers(self, vault_url: str) -> bool:
        """Whether this identity is for that vault. To no other goes anything at all.

        :raise KeyProviderUnavailableError: When the identity's credential cannot be read.
        """

    @abstractmethod
    def hint(self) -> str:
        """What to do about a vault that this identity is not for."""

    @abstractmethod
    def credential(self, vault_url: str) -> Credential:
        """What gives tokens for that vault, which this :meth:`covers`."""

    @abstractmethod
    def authorities(self) -> str | bool:
        """The path of the certificates that are trusted; ``True`` for the system's."""

    def renew(self) -> bool:
        """Ask for a new token next time; false when that is not to be had."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Let go of tokens and connections."""


class CredentialFileAccess(Access):
    """The identity of a credential file, for the file's own vault alone.

    The file is read at first use, and again as long as it cannot be read.

    :param timeout: for the vault to give a token; in seconds.
    """

    follows_environment = False

    def __init__(self, path: Path, *, timeout: float) -> None:
        self._path = path
        self._timeout = timeout
        self._lock = threading.Lock()
        self._opened: VaultCredential | None = None

    def who(self) -> str:
        return f"principal {self._open().file.client_id}"

    def covers(self, vault_url: str) -> bool:
        return self._open().covers(vault_url)

    def hint(self) -> str:
        return f"the credential file {self._path} is for {self._open().file.vault_url} alone"

    def credential(self, vault_url: str) -> Credential:
        return _FileTokens(self._open())

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
                    self._opened = VaultCredential(self._path, timeout=self._timeout)
                except VirtSseError as exc:  # on this host: the vault has said nothing about the key
                    raise KeyProviderUnavailableError(str(exc), hint=exc.hint) from exc
            return self._opened


class _FileTokens:
    """Tokens for the file's own audience and tenant, whatever else a server's challenge may name."""

    def __init__(self, credential: VaultCredential) -> None:
        self._credential = credential

    def get_token(
        self, *scopes: str, claims: str | None = None, tenant_id: str | None = None, **options: object
    ) -> AccessToken:
        return self._credential.get_token(f"{self._credential.file.audience}/.default")


class AzureAccess(Access):
    """An identity that azure-identity knows how to get tokens for.

    That it gets none says nothing about the key: the errors do not tell a deleted identity from a host where
    none was set up.

    :param who: what to call it.
    :param make: makes the credential, at first use.
    :param hosts: ``HOST`` or ``HOST:PORT`` of the vaults that it is for; empty: Azure's own.
    :param authority: the path of the certificates that are trusted for them; ``None`` for the system's.
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
            return "the option 'hosts' does not name it"
        return "a key vault that is not Azure's must be named in the option 'hosts'"

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
    """Tokens for the resource that a vault names, if the vault lies on or under that resource's host."""

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
                    f"the key vault {self._vault_host} asks for a token for something else than itself"
                )
        try:
            return self._credential.get_token(*scopes, claims=claims, tenant_id=tenant_id)
        except Exception as exc:
            reason = " ".join(str(exc).split())[:300].rstrip(".")
            raise KeyProviderUnavailableError(f"no token for the key vault: {reason}") from exc

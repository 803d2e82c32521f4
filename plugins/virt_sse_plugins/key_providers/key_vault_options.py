"""The table ``[key-providers.customer-managed]`` of the configuration."""

from __future__ import annotations

import enum
import importlib.util
import math
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from virt_sse.api import ConfigError, InvalidValueError
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey
from virt_sse_plugins.key_providers.key_vault_access import Access, AzureAccess, CredentialFileAccess

if TYPE_CHECKING:
    from collections.abc import Mapping

    from azure.identity import DefaultAzureCredential, ManagedIdentityCredential

    from virt_sse.api import ProviderConfig

_OPTIONS = frozenset({"credential", "ca", "hosts", "addresses", "connection-timeout", "read-timeout"})
_LONGEST_TIMEOUT = 60.0
_PROCESS_SECONDS = 5
_HOST = re.compile(r"[^/]+")


class CredentialKind(enum.Enum):
    """Source of tokens: the credential file of the set's own identity, or azure-identity."""

    IDENTITY = "identity"
    MANAGED_IDENTITY = "managed-identity"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class KeyVaultOptions:
    """Options of the customer-managed key provider.

    :ivar identity: the credential file; always set for ``CredentialKind.IDENTITY``.
    :ivar ca: file of trusted certificates, in place of the system's authorities.
    :ivar hosts: the only allowed vaults, in place of Azure's.
    :ivar addresses: URLs of a vault's instances, in order of preference, by the vault's URL.
    :ivar connection_timeout: in seconds; also for a vault's own tokens.
    :ivar read_timeout: in seconds, for each answer.
    """

    credential: CredentialKind
    identity: Path | None
    ca: Path | None
    hosts: tuple[str, ...]
    addresses: Mapping[str, tuple[str, ...]]
    connection_timeout: float
    read_timeout: float

    @classmethod
    def parse(cls, provider: str, config: ProviderConfig) -> Self:
        """Parse the provider's options.

        :raise ConfigError: When the options are invalid, or a required package is not installed.
        """
        table = f"[key-providers.{provider}]"
        unknown = sorted(set(config.options) - _OPTIONS)
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r} in {table}")
        options = cls(
            credential=_kind(table, config.options),
            identity=config.identity,
            ca=_ca(table, config.options),
            hosts=_hosts(table, config.options),
            addresses=_addresses(table, config.options),
            connection_timeout=_seconds(table, config.options, "connection-timeout", 2.0),
            read_timeout=_seconds(table, config.options, "read-timeout", 5.0),
        )
        if options.credential is CredentialKind.IDENTITY:
            for option in ("ca", "hosts"):
                if option in config.options:
                    raise ConfigError(
                        f"{option!r} in {table} is not allowed with the credential 'identity'",
                        hint="a credential file already names its vault and the vault's trusted certificate",
                    )
            if options.identity is None:
                raise ConfigError(
                    f"key provider {provider!r} needs an identity",
                    hint=f"use it through a disk encryption set, or choose another 'credential' in {table}",
                )
        elif "addresses" in config.options:
            raise ConfigError(f"'addresses' in {table} needs the credential 'identity'")
        _require_modules(provider, options.credential)
        return options

    def access(self) -> Access:
        """The identity named by these options."""
        if self.credential is CredentialKind.IDENTITY and self.identity is not None:
            return CredentialFileAccess(
                self.identity, timeout=self.connection_timeout, addresses=self.addresses
            )
        managed = self.credential is CredentialKind.MANAGED_IDENTITY
        return AzureAccess(
            "this host's managed identity" if managed else "this host's default Azure credential",
            self._managed_identity if managed else self._default,
            hosts=self.hosts,
            authority=self.ca,
        )

    def _managed_identity(self) -> ManagedIdentityCredential:
        from azure.identity import ManagedIdentityCredential

        return ManagedIdentityCredential(
            retry_total=0, connection_timeout=self.connection_timeout, read_timeout=self.read_timeout
        )

    def _default(self) -> DefaultAzureCredential:
        from azure.identity import DefaultAzureCredential

        return DefaultAzureCredential(
            retry_total=0,
            connection_timeout=self.connection_timeout,
            read_timeout=self.read_timeout,
            process_timeout=_PROCESS_SECONDS,
        )


def _kind(table: str, options: Mapping[str, object]) -> CredentialKind:
    try:
        return CredentialKind(options.get("credential", CredentialKind.IDENTITY.value))
    except ValueError:
        kinds = ", ".join(kind.value for kind in CredentialKind)
        raise ConfigError(f"'credential' in {table} must be one of {kinds}") from None


def _ca(table: str, options: Mapping[str, object]) -> Path | None:
    if "ca" not in options:
        return None
    path = options["ca"]
    if not isinstance(path, str):
        raise ConfigError(f"'ca' in {table} must be the path of certificates in PEM")
    try:
        ssl.create_default_context(cafile=path)
    except OSError as exc:  # includes ssl.SSLError
        raise ConfigError(f"'ca' in {table}: cannot read certificates from {path}: {exc.strerror}") from exc
    return Path(path)


def _hosts(table: str, options: Mapping[str, object]) -> tuple[str, ...]:
    if "hosts" not in options:
        return ()
    hosts = options["hosts"]
    if not isinstance(hosts, list) or not hosts:
        raise ConfigError(f"'hosts' in {table} must be a list of HOST or HOST:PORT")
    return tuple(_host(table, host) for host in hosts)


def _host(table: str, host: object) -> str:
    """*host* in the form of a vault's URL."""
    try:
        if isinstance(host, str) and _HOST.fullmatch(host):
            return KeyVaultKey.parse(f"https://{host}/keys/k").vault_url.removeprefix("https://")
    except InvalidValueError:
        pass
    raise ConfigError(f"'hosts' in {table}: {host!r} is neither HOST nor HOST:PORT")


def _addresses(table: str, options: Mapping[str, object]) -> Mapping[str, tuple[str, ...]]:
    given = options.get("addresses", {})
    if not isinstance(given, dict):
        raise ConfigError(f"'addresses' in {table} must be a table of lists of URLs, by the vaults' URLs")
    found = {}
    for vault, urls in given.items():
        if not isinstance(urls, list) or not urls:
            raise ConfigError(f"'addresses' in {table}: {vault!r} needs a list of URLs")
        found[_vault_url(table, vault)] = tuple(_vault_url(table, url) for url in urls)
    return found


def _vault_url(table: str, url: object) -> str:
    """*url* in the form of a vault's URL."""
    try:
        if isinstance(url, str):
            return KeyVaultKey.parse(f"{url.rstrip('/')}/keys/k").vault_url
    except InvalidValueError:
        pass
    raise ConfigError(f"'addresses' in {table}: {url!r} is not https://HOST[:PORT]")


def _seconds(table: str, options: Mapping[str, object], name: str, default: float) -> float:
    value = options.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{name!r} in {table} must be a number of seconds")
    if not 0 < value <= _LONGEST_TIMEOUT:
        raise ConfigError(f"{name!r} in {table} must be more than 0 and at most {_LONGEST_TIMEOUT:.0f} s")
    return float(value)


def _require_modules(provider: str, kind: CredentialKind) -> None:
    """Check that the SDK is installed, without importing the SDK: an import takes a quarter of a second."""
    for module in ("azure.keyvault.keys", "jwt" if kind is CredentialKind.IDENTITY else "azure.identity"):
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise ConfigError(
                f"key provider {provider!r} needs {module}, and {module} is not installed",
                hint="install virt-sse with its extra 'azure'",
            )

"""The settings of a vault, fixed when the vault is created."""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Mapping
from typing import Self
from urllib.parse import urlsplit
from uuid import UUID

import msgspec

from virt_sse.errors import InvalidValueError, VaultError
from virt_sse.system.database_url import is_postgresql
from virt_sse.system.documents import DocumentError, from_json

_FORMAT = 1
_NAME = re.compile(r"[a-zA-Z](?:-?[0-9a-zA-Z]){2,23}\Z")
_HOST = re.compile(r"[0-9a-zA-Z](?:[0-9a-zA-Z.-]{0,252}[0-9a-zA-Z])?\Z")
RETENTION_DAYS = range(7, 91)
DEFAULT_PORT = 8443
NEEDS_A_SHARED_HSM = "a vault in PostgreSQL needs an HSM token that all of its instances reach"


class Tier(enum.Enum):
    """The vault's tier, as in Azure: a premium vault may also have keys in an HSM."""

    STANDARD = "standard"
    PREMIUM = "premium"


class HsmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a premium vault keeps its RSA-HSM keys.

    :ivar tag: prefix of the labels of this vault's objects; several vaults may share an HSM token.
    :ivar options: the HSM token, as in :class:`~virt_sse.pkcs11.options.TokenOptions`; empty for a SoftHSM
        token in the vault's folder.
    """

    tag: str
    options: Mapping[str, str] = {}

    def __post_init__(self) -> None:
        if not self.tag:
            raise InvalidValueError("the tag of the vault's HSM is empty")


class _Header(msgspec.Struct):
    format: int


class VaultSettings(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="format", tag=_FORMAT
):
    """The settings of a vault, stored as ``vault.json``.

    :ivar name: 3 to 24 letters, digits and single hyphens, as in Azure.
    :ivar tenant: a UUID, common to the vault's identities and access tokens.
    :ivar url: the address for clients; part of every key identifier, so never changed.
    :ivar audience: the ``aud`` claim of access tokens; Azure calls it the resource.
    :ivar hosts: names and addresses in the server's certificate.
    :ivar retention_days: how long a deleted key can be recovered.
    :ivar purge_protection: refuse to purge a deleted key earlier. Cannot be switched off again.
    :ivar hsm: ``None`` for a vault without RSA-HSM keys: standard vaults and premium vaults of older
        versions.
    :ivar database: SQLAlchemy URL of a database in PostgreSQL, for several instances; ``None`` for SQLite in
        the vault's folder.
    """

    name: str
    tenant: str
    tier: Tier
    url: str
    audience: str
    hosts: tuple[str, ...]
    retention_days: int = RETENTION_DAYS[-1]
    purge_protection: bool = False
    hsm: HsmSettings | None = msgspec.field(default=None, name="token")
    database: str | None = None

    def __repr__(self) -> str:
        return f"VaultSettings({self.name!r} at {self.url!r})"  # the database's URL may have a password

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise InvalidValueError(
                f"vault name {self.name[:80]!r} must be 3 to 24 letters, digits and single hyphens"
            )
        if not _is_url(self.url):
            raise InvalidValueError(f"invalid URL of the vault {self.url[:80]!r}")
        if not self.hosts:
            raise InvalidValueError("a vault needs at least one host name")
        try:
            UUID(self.tenant)
        except ValueError:
            raise InvalidValueError(f"invalid tenant {self.tenant[:80]!r}: not a UUID") from None
        if self.hsm is not None and self.tier is Tier.STANDARD:
            raise InvalidValueError("a standard vault has no HSM; choose the premium tier")
        for host in self.hosts:
            if not _HOST.match(host) and not _is_address(host):
                raise InvalidValueError(f"invalid host name or address {host[:80]!r}")
        if self.database is not None and not is_postgresql(self.database):
            raise InvalidValueError(
                "a vault's database is in SQLite in its folder, or in PostgreSQL",
                hint="e.g. postgresql+psycopg://virt_sse_vault@db.example/virt_sse_vault",
            )
        if self.database is not None and self.hsm is not None and not self.hsm.options:
            raise InvalidValueError(NEEDS_A_SHARED_HSM)
        if self.retention_days not in RETENTION_DAYS:
            raise InvalidValueError(f"retention must be 7 to 90 days, not {self.retention_days}")

    @property
    def identity(self) -> str:
        """Tenant and name: what the vault's root key belongs to."""
        return f"{self.tenant}/{self.name}"

    @property
    def port(self) -> int:
        """The port in :attr:`url`."""
        return urlsplit(self.url).port or 443

    @property
    def issuer(self) -> str:
        """The issuer (``iss``) of the vault's access tokens."""
        return f"{self.url}/{self.tenant}/v2.0"

    @property
    def token_endpoint(self) -> str:
        """The URL of the token endpoint, which is also the audience of client assertions."""
        return f"{self.url}/{self.tenant}/oauth2/v2.0/token"

    @property
    def recovery_level(self) -> str:
        """Azure's name for the ways to recover a deleted key."""
        level = "Recoverable" if self.purge_protection else "Recoverable+Purgeable"
        return level if self.retention_days == RETENTION_DAYS[-1] else f"Customized{level}"

    def to_json(self) -> bytes:
        """Encode the settings as ``vault.json``."""
        fields = msgspec.to_builtins(self)
        for name in ("token", "database"):  # older versions refuse the fields
            if fields[name] is None:
                del fields[name]
        return msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"

    @classmethod
    def from_json(cls, document: bytes) -> Self:
        """Decode ``vault.json``.

        :raise VaultError: When *document* is malformed or of a newer version.
        """
        try:
            if from_json(document, _Header).format != _FORMAT:
                raise VaultError("the vault was made by a newer version")
            return from_json(document, cls)
        except DocumentError as exc:
            raise VaultError(f"cannot read the vault's settings: {exc}") from exc


def _is_url(url: str) -> bool:
    try:
        return urlsplit(url).port is None or bool(urlsplit(url).hostname)
    except ValueError:
        return False


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def url_of(host: str, port: int) -> str:
    """Build the URL of a vault on *host*, a name, an IPv4 or an IPv6 address."""
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"

"""What a vault is: its names and rules, fixed when it is made."""

from __future__ import annotations

import dataclasses
import enum
import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit
from uuid import UUID

from virt_sse.errors import InvalidValueError, VaultError

_FORMAT = 1
_NAME = re.compile(r"[a-zA-Z](?:-?[0-9a-zA-Z]){2,23}\Z")
_HOST = re.compile(r"[0-9a-zA-Z](?:[0-9a-zA-Z.-]{0,252}[0-9a-zA-Z])?\Z")
RETENTION_DAYS = range(7, 91)
DEFAULT_PORT = 8443


class Tier(enum.Enum):
    """What a vault is sold as: a premium one may also have keys in an HSM."""

    STANDARD = "standard"
    PREMIUM = "premium"


@dataclass(frozen=True, slots=True)
class TokenSettings:
    """Where a premium vault keeps its RSA-HSM keys.

    :ivar tag: how the labels of this vault's objects begin: other vaults may have theirs in the same token.
    :ivar options: which token, as in :class:`~virt_sse.pkcs11.options.TokenOptions`; none: a SoftHSM token of
        the vault's own, in its folder.
    """

    tag: str
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = (self.tag, *self.options.keys(), *self.options.values())
        if not self.tag or not all(isinstance(text, str) for text in texts):
            raise InvalidValueError("a vault's token has a tag, and options that are strings")


@dataclass(frozen=True, slots=True)
class VaultSettings:
    """:ivar name: 3 to 24 letters, digits and single hyphens, as Azure has it.
    :ivar tenant: a UUID; identities and tokens are of this tenant.
    :ivar url: where clients reach the vault; in all its key identifiers, so it never changes.
    :ivar audience: whom tokens are for; in Azure's words, the resource.
    :ivar hosts: the names and addresses in the server's certificate.
    :ivar retention_days: how long a deleted key can be recovered.
    :ivar purge_protection: a deleted key cannot be purged before that. Once on, never off again.
    :ivar token: ``None``: the vault has no RSA-HSM keys, as premium ones had none before there were tokens.
    """

    name: str
    tenant: str
    tier: Tier
    url: str
    audience: str
    hosts: tuple[str, ...]
    retention_days: int = RETENTION_DAYS[-1]
    purge_protection: bool = False
    token: TokenSettings | None = None

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise InvalidValueError(
                f"vault name {self.name[:80]!r} must be 3 to 24 letters, digits and single hyphens"
            )
        if not self.hosts:
            raise InvalidValueError("a vault needs at least one host name")
        try:
            UUID(self.tenant)
        except ValueError:
            raise InvalidValueError(f"tenant {self.tenant[:80]!r} is no UUID") from None
        if self.token is not None and self.tier is Tier.STANDARD:
            raise InvalidValueError("a standard vault has no token; a premium one has")
        for host in self.hosts:
            if not _HOST.match(host) and not _is_address(host):
                raise InvalidValueError(f"{host[:80]!r} is no host name or address")
        if self.retention_days not in RETENTION_DAYS:
            raise InvalidValueError(f"deleted keys are kept for 7 to 90 days, not {self.retention_days}")

    @property
    def port(self) -> int:
        """The port in :attr:`url`."""
        return urlsplit(self.url).port or 443

    @property
    def issuer(self) -> str:
        """Who issues the vault's tokens."""
        return f"{self.url}/{self.tenant}/v2.0"

    @property
    def token_endpoint(self) -> str:
        """Where tokens are to be had, and whom client assertions are for."""
        return f"{self.url}/{self.tenant}/oauth2/v2.0/token"

    @property
    def recovery_level(self) -> str:
        """Azure's name for what can be done about a deleted key."""
        level = "Recoverable" if self.purge_protection else "Recoverable+Purgeable"
        return level if self.retention_days == RETENTION_DAYS[-1] else f"Customized{level}"

    def to_json(self) -> bytes:
        """The form in which it lies in a vault's folder."""
        fields = dataclasses.asdict(self) | {"tier": self.tier.value, "format": _FORMAT}
        if self.token is None:  # so that older versions read it
            del fields["token"]
        return json.dumps(fields, indent=2).encode() + b"\n"

    @classmethod
    def from_json(cls, document: bytes) -> Self:
        """:raise VaultError: When *document* is none of ours, or a newer version's."""
        try:
            fields = json.loads(document)
            if fields.pop("format") != _FORMAT:
                raise VaultError("the vault was made by a newer version")
            if "token" in fields:
                fields["token"] = TokenSettings(**fields["token"])
            return cls(**fields | {"tier": Tier(fields["tier"]), "hosts": tuple(fields["hosts"])})
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise VaultError(f"the vault's settings cannot be read: {type(exc).__name__}") from exc


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def url_of(host: str, port: int) -> str:
    """The URL of a vault on *host*, which may be an IPv6 address."""
    return f"https://{f'[{host}]' if ':' in host else host}:{port}"

"""URLs of keys in key vaults, in the form of Azure's: ``https://VAULT[:PORT]/keys/NAME[/VERSION]``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Self

from virt_sse.api import InvalidValueError

_HINT = "a key's URL is https://VAULT[:PORT]/keys/NAME, followed by /VERSION to name a version of the key"
_LABEL = r"[0-9a-z](?:[0-9a-z-]{0,61}[0-9a-z])?"
_URL = re.compile(
    rf"https://(?P<host>{_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{{0,4}}))?"
    r"/keys/(?P<name>[0-9a-z-]{1,127})(?:/(?P<version>[0-9a-f]{32}))?/?",
    re.ASCII | re.IGNORECASE,
)
_VERSION = re.compile(r"[0-9a-f]{32}", re.ASCII)
_HTTPS_PORT = 443
_LONGEST_HOST = 253


@dataclass(frozen=True, slots=True)
class KeyVaultKey:
    """A key in a key vault, or a version of a key.

    :ivar vault_url: scheme, host and, unless 443, port; in lower case.
    :ivar name: 1 to 127 letters, digits and hyphens.
    :ivar version: 32 hexadecimal digits, or ``None`` when no version is named.
    """

    vault_url: str
    name: str
    version: str | None = None

    @property
    def url(self) -> str:
        """The key's URL without a version: the name of the KEK."""
        return f"{self.vault_url}/keys/{self.name}"

    @classmethod
    def parse(cls, url: str) -> Self:
        """Parse a key's URL. Strict, because credentials are sent to the named host.

        :raise InvalidValueError: When *url* is not a key's URL. The message omits a URL that may contain a
            secret.
        """
        for mark, what in (("@", "a user"), ("?", "a query"), ("#", "a fragment")):
            if mark in url:
                raise InvalidValueError(f"a key's URL must not have {what}", hint=_HINT)
        match = _URL.fullmatch(url)
        if match is None:
            raise InvalidValueError(f"{url[:200]!r} is not a key's URL", hint=_HINT)
        host, port = _host(match["host"].lower()), int(match["port"] or _HTTPS_PORT)
        if port > 0xFFFF:
            raise InvalidValueError(f"{url[:200]!r} has an invalid port", hint=_HINT)
        vault_url = f"https://{host}" if port == _HTTPS_PORT else f"https://{host}:{port}"
        version = match["version"]
        return cls(vault_url, match["name"], version.lower() if version else None)


def is_key_version(version: str) -> bool:
    """Whether *version* has the form of a version in a key vault."""
    return _VERSION.fullmatch(version) is not None


def _host(host: str) -> str:
    if len(host) > _LONGEST_HOST:
        raise InvalidValueError("the host name in a key's URL is too long", hint=_HINT)
    if not host.startswith("["):
        return host
    try:
        return f"[{ipaddress.IPv6Address(host[1:-1])}]"
    except ValueError:
        raise InvalidValueError(f"{host!r} is not an IPv6 address", hint=_HINT) from None

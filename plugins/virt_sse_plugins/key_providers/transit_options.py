"""The table ``[key-providers.vault-transit]`` of the configuration."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal, Self

import msgspec

from virt_sse.api import ConfigError, InvalidValueError
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey

if TYPE_CHECKING:
    from collections.abc import Mapping

_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_SEGMENT = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_Path = Annotated[str, msgspec.Meta(pattern=r"^/", max_length=4096)]
_Segments = Annotated[str, msgspec.Meta(pattern=rf"^{_SEGMENT}(/{_SEGMENT})*$", max_length=200)]
_Name = Annotated[str, msgspec.Meta(pattern=r"^[\x21-\x7e]+$", max_length=200)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=60)]

_MEANINGS = {
    "urls": "must be a list of https://HOST[:PORT], one for each server",
    "ca": "must be the absolute path of certificates in PEM",
    "namespace": "must be the path of a namespace, e.g. team/web",
    "login": "must be 'approle' or 'cert'",
    "login-mount": "must be the path of an auth method, e.g. approle",
    "role-id": "must be the AppRole's role_id",
    "secret-id-file": "must be an absolute path",
    "certificate": "must be an absolute path",
    "private-key": "must be an absolute path",
    "role": "must be the name of a role of the auth method 'cert'",
    "connection-timeout": "must be a number of seconds above 0, at most 60",
    "timeout": "must be a number of seconds above 0, at most 60",
}
_NEEDED = {"approle": ("role-id", "secret-id-file"), "cert": ("certificate", "private-key")}
"""The options that a login needs, and no other login has."""


class TransitOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Options of the transit key provider.

    :ivar urls: of one server or cluster, in order of preference.
    :ivar ca: file of the only trusted certificates; ``None`` for the system's authorities.
    :ivar namespace: of login and keys.
    :ivar login: the auth method.
    :ivar login_mount: the auth method's path below ``auth/``; by default, the method's name.
    :ivar secret_id_file: private file with the AppRole's secret_id.
    :ivar certificate: the client's certificate, with its intermediates; PEM.
    :ivar private_key: private file with the certificate's key; PEM.
    :ivar role: restricts the login with a certificate to this role.
    :ivar connection_timeout: in seconds, for each address.
    :ivar timeout: in seconds, for each use of a key, at all addresses together.
    """

    urls: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=16)]
    ca: _Path | None = None
    namespace: _Segments | None = None
    login: Literal["approle", "cert"] = "approle"
    login_mount: _Segments | None = None
    role_id: _Name | None = None
    secret_id_file: _Path | None = None
    certificate: _Path | None = None
    private_key: _Path | None = None
    role: _Name | None = None
    connection_timeout: _Seconds = 2.0
    timeout: _Seconds = 8.0

    @classmethod
    def parse(cls, provider: str, options: Mapping[str, object]) -> Self:
        """Parse the provider's options.

        :raise ConfigError: When the options are invalid.
        """
        table = f"[key-providers.{provider}]"
        try:
            found = msgspec.convert(dict(options), cls)
        except (msgspec.ValidationError, UnicodeError) as exc:
            raise ConfigError(_problem(table, str(exc))) from None
        for login, names in _NEEDED.items():
            for name in names:
                if login == found.login and name not in options:
                    raise ConfigError(f"{name!r} is missing in {table}: the login {login!r} needs it")
                if login != found.login and name in options:
                    raise ConfigError(f"{name!r} in {table} is not allowed with the login {found.login!r}")
        return msgspec.structs.replace(found, urls=tuple(_url(table, url) for url in found.urls))

    @property
    def login_path(self) -> str:
        """The path of the login below the server's ``/v1/``."""
        return f"auth/{self.login_mount or self.login}/login"


def _url(table: str, url: str) -> str:
    """*url* as scheme, host and, unless 443, port."""
    try:
        return KeyVaultKey.parse(f"{url.removesuffix('/')}/keys/k").vault_url
    except InvalidValueError:
        raise ConfigError(f"'urls' in {table}: {url[:200]!r} is not https://HOST[:PORT]") from None


def _problem(table: str, message: str) -> str:
    if unknown := _UNKNOWN.match(message):
        return f"unknown option {unknown[1]!r} in {table}"
    for name, meaning in _MEANINGS.items():
        if re.search(rf"\$\.{name}(\[|`)", message):
            return f"{name!r} in {table} {meaning}"
    return f"'urls' is missing in {table}" if "`urls`" in message else f"{table}: {message}"

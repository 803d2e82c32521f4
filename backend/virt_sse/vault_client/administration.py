"""Remote administration of a vault, with a credential file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar
from urllib.parse import quote

import msgspec

from virt_sse.errors import CredentialError, VaultError
from virt_sse.system.documents import DocumentError, convert
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.credential_file import CredentialFile, new_assertion_key
from virt_sse.vault_client.https import checked
from virt_sse.vault_client.permissions import Permission, Role

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PrincipalInfo:
    """A principal of the vault. Times are in seconds since 1970."""

    client_id: str
    object_id: str
    tenant: str
    name: str
    role: Role
    enabled: bool
    expires: int | None
    created: int
    created_by: str | None


class _PrincipalList(msgspec.Struct):
    value: list[PrincipalInfo]


class AccessPolicy(msgspec.Struct, frozen=True):
    """Permissions of a principal.

    :ivar permissions: on all keys.
    :ivar keys: further permissions, by the name of a key in lower case.
    """

    name: str
    permissions: frozenset[Permission]
    keys: dict[str, frozenset[Permission]] = {}

    def on(self, key: str | None) -> frozenset[Permission]:
        """The permissions granted on a key; on all keys if ``None``."""
        return self.permissions if key is None else self.keys.get(key.lower(), frozenset())


class _PolicyList(msgspec.Struct):
    value: list[AccessPolicy]


class VaultClient:
    """A client of a vault's management interface, for the vault of a credential file.

    Every method may raise, besides its documented exceptions:

    :raise KeyDeniedError: When the vault rejects the credential or denies the operation.
    :raise KeyProviderUnavailableError: When the vault does not answer.
    :raise InvalidValueError: When the vault rejects a value.

    :param timeout: in seconds, for connecting and for each response.
    """

    def __init__(self, credential: CredentialFile | Path, *, timeout: float = 5.0) -> None:
        self._credential = VaultCredential(credential, timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop the access token and close the credential."""
        self._credential.close()

    @property
    def url(self) -> str:
        """The vault's URL."""
        return self._credential.file.vault_url

    def status(self) -> Mapping[str, object]:
        """Return the vault's description and numbers of keys and principals."""
        return self._ask("GET", "/status")

    def principals(self) -> list[PrincipalInfo]:
        """List all principals; an identity operator sees only its own creations."""
        return _decoded(self._ask("GET", "/identity/principals"), _PrincipalList).value

    def get_principal(self, principal: str) -> PrincipalInfo:
        """Return a principal by client id, object id or name.

        :raise PrincipalNotFoundError: When there is no such principal.
        """
        return _decoded(self._ask("GET", _path("identity/principals", principal)), PrincipalInfo)

    def create_principal(
        self, name: str, public_key_pem: str, *, role: Role = Role.NONE, expires: int | None = None
    ) -> PrincipalInfo:
        """Create a principal without permissions; its private key stays with the caller.

        :param expires: seconds since 1970.
        :raise PrincipalExistsError: When the name is taken.
        """
        document = {"name": name, "public_key": public_key_pem, "role": role.value, "expires": expires}
        return _decoded(self._ask("POST", "/identity/principals", document), PrincipalInfo)

    def change_principal(self, principal: str, *, enabled: bool, expires: int | None) -> PrincipalInfo:
        """Enable or disable a principal, and set its expiry.

        :raise PrincipalNotFoundError: When there is no such principal.
        """
        return self._change(principal, {"enabled": enabled, "expires": expires})

    def enable_principal(self, principal: str) -> PrincipalInfo:
        """Enable a principal, and keep its expiry.

        :raise PrincipalNotFoundError: When there is no such principal.
        """
        return self._change(principal, {"enabled": True})

    def disable_principal(self, principal: str) -> PrincipalInfo:
        """Disable a principal, and keep its expiry.

        :raise PrincipalNotFoundError: When there is no such principal.
        """
        return self._change(principal, {"enabled": False})

    def delete_principal(self, principal: str) -> None:
        """Delete a principal with its permissions; its access tokens are refused from now on.

        :raise PrincipalNotFoundError: When there is no such principal.
        """
        self._ask("DELETE", _path("identity/principals", principal))

    def access(self) -> list[AccessPolicy]:
        """Return the permissions of all principals."""
        return _decoded(self._ask("GET", "/access/policies"), _PolicyList).value

    def permissions(self, principal: str) -> frozenset[Permission]:
        """Return a principal's permissions on keys.

        :raise PrincipalNotFoundError: When there is no such principal.
        """
        return _decoded(self._ask("GET", _path("access/policies", principal)), AccessPolicy).permissions

    def set_permissions(
        self, principal: str, permissions: Iterable[Permission], *, key: str | None = None
    ) -> frozenset[Permission]:
        """Set a principal's permissions on a key, or on all keys.

        :return: these permissions.
        :raise PrincipalNotFoundError: When there is no such principal, or no such key.
        """
        names = sorted(permission.value for permission in permissions)
        document = {"permissions": names, "key": key}
        answer = self._ask("PUT", _path("access/policies", principal), document)
        return _decoded(answer, AccessPolicy).on(key)

    def grant(self, principal: str, permissions: Iterable[Permission]) -> frozenset[Permission]:
        """Add permissions on keys to a principal.

        :return: all permissions of the principal.
        :raise PrincipalNotFoundError: When there is no such principal.
        """
        return self._adjust(principal, "grant", permissions)

    def revoke(
        self, principal: str, permissions: Iterable[Permission] | None = None, *, key: str | None = None
    ) -> frozenset[Permission]:
        """Remove a principal's permissions on a key, or on all keys; by default all permissions.

        :return: the remaining permissions there.
        :raise PrincipalNotFoundError: When there is no such principal, or no such key.
        """
        taken = frozenset(Permission) if permissions is None else frozenset(permissions)
        return self._adjust(principal, "revoke", taken, key=key)

    def revoke_all(self, principal: str) -> None:
        """Remove all permissions of a principal, those on single keys included.

        :raise PrincipalNotFoundError: When there is no such principal.
        """
        self._ask("DELETE", _path("access/policies", principal))

    def _change(self, principal: str, document: Mapping[str, object]) -> PrincipalInfo:
        answer = self._ask("PATCH", _path("identity/principals", principal), document)
        return _decoded(answer, PrincipalInfo)

    def _adjust(
        self, principal: str, change: str, permissions: Iterable[Permission], *, key: str | None = None
    ) -> frozenset[Permission]:
        document = {change: sorted(permission.value for permission in permissions), "key": key}
        answer = self._ask("PATCH", _path("access/policies", principal), document)
        return _decoded(answer, AccessPolicy).on(key)

    def new_credential_file(
        self, path: Path, name: str, *, role: Role = Role.NONE, expires: int | None = None
    ) -> CredentialFile:
        """Create a principal with a new key, and its credential file at *path*, which must not exist.

        If the file cannot be written, the principal is deleted again.

        :raise PrincipalExistsError: When the name is taken.
        :raise CredentialError: When the file exists already or cannot be written.
        """
        if path.exists():
            raise CredentialError(f"{path} exists already")
        private, public = new_assertion_key()
        principal = self.create_principal(name, public, role=role, expires=expires)
        own = self._credential.file
        file = CredentialFile(
            vault_url=own.vault_url,
            ca_certificate=own.ca_certificate,
            audience=own.audience,
            tenant=principal.tenant,
            client_id=principal.client_id,
            object_id=principal.object_id,
            token_endpoint=own.token_endpoint,
            private_key=private,
            expires=expires,
        )
        try:
            file.write(path)
        except BaseException:
            with contextlib.suppress(VaultError):
                self.delete_principal(principal.client_id)
            raise
        return file

    def _ask(
        self, method: str, path: str, document: Mapping[str, object] | None = None
    ) -> Mapping[str, object]:
        connection = self._credential.connection
        response = connection.json(method, path, document, token=self._credential.token())
        if response.status == 401:  # a vault created anew, or a changed clock: retry with a new access token
            self._credential.forget()
            response = connection.json(method, path, document, token=self._credential.token())
        return checked(response)


def _path(collection: str, principal: str) -> str:
    return f"/{collection}/{quote(principal, safe='')}"


def _decoded(document: Mapping[str, object], kind: type[T]) -> T:
    try:
        return convert(document, kind)
    except DocumentError as exc:
        raise VaultError(f"unexpected answer of the key vault: {exc}") from exc

"""Audited administration of the keys in a host's token."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

from cryptography.hazmat.primitives.asymmetric import rsa

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditRecord, Component, Result, process_actor
from virt_sse.errors import VirtSseError
from virt_sse.model.events import correlated
from virt_sse.pkcs11.token import KeyKind, Token, TokenKey
from virt_sse.pkcs11.versions import VersionedKeys

T = TypeVar("T")


class TokenAdministration:
    """Changes keys, and writes an audit record before each change and another with its result.

    Closes the token at the end of its context. Methods raise the errors of :class:`VersionedKeys`, and
    :class:`~virt_sse.errors.AuditError` when a change cannot be recorded; the change is then not made.

    :param provider: name of the key provider in the log.
    """

    def __init__(self, token: Token, audit: AuditLog, *, provider: str) -> None:
        self._token = token
        self._keys = VersionedKeys(token)
        self._audit = audit
        self._provider = provider

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._token.close()

    def all(self) -> list[TokenKey]:
        """All keys, sorted by name, oldest version first."""
        return self._keys.all()

    def current(self, name: str) -> TokenKey:
        """The current version of a key."""
        return self._keys.current(name)

    def versions(self, name: str, version: str | None) -> list[TokenKey]:
        """The given version of a key, or all versions, oldest first."""
        return [self._keys.get(name, version)] if version is not None else self._keys.versions(name)

    def create(self, name: str, kind: KeyKind, bits: int) -> TokenKey:
        """Make a key in the token."""
        return self._recorded("create", name, None, lambda: self._keys.create(name, kind, bits))

    def bring(self, name: str, private: rsa.RSAPrivateKey) -> TokenKey:
        """Bring a private key into the token, by wrapped transfer."""
        return self._recorded("import", name, None, lambda: self._keys.bring(name, private))

    def set_enabled(self, key: TokenKey, *, enabled: bool) -> None:
        """Enable or disable a version of a key."""
        action = "enable" if enabled else "disable"
        self._recorded(action, key.label, key, lambda: self._token.set_enabled(key, enabled))

    def destroy(self, key: TokenKey) -> None:
        """Destroy a version of a key permanently."""
        self._recorded("destroy", key.label, key, lambda: self._token.destroy(key))

    def _recorded(self, action: str, name: str, key: TokenKey | None, change: Callable[[], T]) -> T:
        with correlated() as correlation:
            record = AuditRecord(
                component=Component.HOST,
                actor=process_actor(),
                action=action,
                key=f"{self._provider}:{name}",
                key_version=key.id.hex() if key else None,
                source=os.uname().nodename,
                result=Result.REQUESTED,
                correlation=correlation,
            )
            self._audit.append(record)
            try:
                result = change()
            except BaseException as exc:
                message = f": {exc}" if isinstance(exc, VirtSseError) else ""
                reason = type(exc).__name__ + message
                self._audit.append(
                    replace(record, time=datetime.now(UTC), result=Result.REFUSED, reason=reason)
                )
                raise
            version = result.id.hex() if isinstance(result, TokenKey) else record.key_version
            self._audit.append(
                replace(record, time=datetime.now(UTC), result=Result.ALLOWED, key_version=version)
            )
            return result

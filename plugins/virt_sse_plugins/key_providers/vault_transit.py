"""Transit keys: KEKs stored and used only inside a HashiCorp Vault or OpenBao server."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Self

from virt_sse.api import (
    Dek,
    DekContext,
    InvalidValueError,
    KeyDeniedError,
    KeyId,
    KeyNotFoundError,
    KeyProvider,
    KeyProviderUnavailableError,
    KeyState,
    ProviderConfig,
    UnwrapError,
    VirtSseError,
    WrappedDek,
)
from virt_sse_plugins.key_providers.transit_keys import (
    ALGORITHMS,
    TransitKey,
    TransitPath,
    is_transit_version,
)
from virt_sse_plugins.key_providers.transit_options import TransitOptions
from virt_sse_plugins.key_providers.transit_server import TransitRejectionError, TransitServer

_CIPHERTEXT = re.compile(r"vault:v([1-9][0-9]{0,8}):([A-Za-z0-9+/]+={0,2})", re.ASCII)
_READING = "reading of the key"


class VaultTransitKeyProvider(KeyProvider):
    """Wraps DEKs by ``encrypt`` and unwraps them by ``decrypt`` of a transit secrets engine.

    The name of a key is its path, ``transit/keys/web``; its versions are the engine's. The digest of a DEK's
    disk and slot is part of the payload, and is also the ``associated_data`` and, of derived keys, the
    ``context``. Ciphertext is stored without the engine's prefix ``vault:vN:``.

    Every method but :meth:`from_config` and :meth:`key_state` raises, in addition to the contract's errors,
    :class:`~virt_sse.errors.KeyDeniedError` when the server refuses the login or a policy forbids the use,
    and :class:`~virt_sse.errors.KeyProviderUnavailableError` when no address answers, the server is sealed,
    or the host's own credential cannot be read.
    """

    name = "vault-transit"

    def __init__(self, options: TransitOptions) -> None:
        self._server = TransitServer(options)

    @classmethod
    def from_config(cls, config: ProviderConfig) -> Self:
        return cls(TransitOptions.parse(cls.name, config.options))

    @classmethod
    def parse_key(cls, text: str) -> tuple[str, str | None]:
        path = TransitPath.parse(text)
        return str(path), path.version

    def current_key(self, name: str) -> KeyId:
        path = _parse(name)
        key = self._read(path)
        key.algorithm(path)
        key.check(path, key.latest_version)
        return KeyId(self.name, name, str(key.latest_version))

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        path, version = _parse_version(key)
        found = self._read(path)  # 'encrypt' may create an absent key
        algorithm = found.algorithm(path)
        found.check_encryption(path, version)
        document = self._server.ask(
            "wrap",
            "POST",
            path.operation("encrypt"),
            {"plaintext": _base64(context.bind(dek)), "key_version": version} | _binding(context),
            disk=str(context.disk_id),
        )
        text = document.get("ciphertext")
        match = _CIPHERTEXT.fullmatch(text) if isinstance(text, str) else None
        if match is None or int(match[1]) != version:
            raise _senseless()
        ciphertext = _bytes(match[2])
        if len(ciphertext) != algorithm.ciphertext_length:  # unwrapping would fail
            raise _senseless()
        return WrappedDek(ciphertext, algorithm.name, key)

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        lengths = [each.ciphertext_length for each in ALGORITHMS.values() if each.name == wrapped.algorithm]
        if not lengths:
            raise UnwrapError(f"a key of {self.name!r} does not wrap by {wrapped.algorithm[:40]!r}")
        path, version = _parse_version(wrapped.key)
        if len(wrapped.ciphertext) not in lengths:
            self._read(path).check(path, version)  # a missing or disabled key is the first reason, as below
            raise wrapped.damaged(context, f"{len(wrapped.ciphertext)} bytes")
        try:
            document = self._server.ask(
                "unwrap",
                "POST",
                path.operation("decrypt"),
                {"ciphertext": f"vault:v{version}:{_base64(wrapped.ciphertext)}"} | _binding(context),
                disk=str(context.disk_id),
            )
        except TransitRejectionError as exc:
            # The server's words differ between versions: the key itself tells the reason.
            self._read(path).check(path, version)
            raise wrapped.damaged(context, exc) from exc
        return context.release(_bytes(document.get("plaintext")))

    def key_state(self, key: KeyId) -> KeyState:
        """The state of a version: ``DISABLED`` below the key's ``min_decryption_version``."""
        try:
            path, version = _parse_version(key)
            self._read(path).check(path, version)
        except VirtSseError as exc:
            return KeyState.of_error(exc)
        return KeyState.ENABLED

    def rotate(self, name: str) -> KeyId:
        """Make a new version of the key, if the server permits.

        :raise KeyDeniedError: When the policies do not permit rotation; usual, since the key's administrator
            rotates.
        """
        path = _parse(name)
        self._read(path).algorithm(path)
        try:
            self._server.ask("rotation", "POST", f"{path}/rotate", {}, repeatable=False)
        except KeyDeniedError as exc:
            raise KeyDeniedError(str(exc), hint="rotation is a task of the key's administrator") from exc
        return self.current_key(name)

    def close(self) -> None:
        self._server.close()

    def _read(self, path: TransitPath) -> TransitKey:
        return TransitKey.of(self._server.ask(_READING, "GET", str(path)))


def _parse(name: str) -> TransitPath:
    try:
        path = TransitPath.parse(name)
    except InvalidValueError as exc:
        raise KeyNotFoundError(f"invalid name of a transit key: {exc}", hint=exc.hint) from exc
    if path.version is not None:
        raise KeyNotFoundError(f"invalid key name {name!r}: expected the key's path without a version")
    return path


def _parse_version(key: KeyId) -> tuple[TransitPath, int]:
    path = _parse(key.name)
    if not is_transit_version(key.version):
        raise KeyNotFoundError(f"invalid version {key.version[:40]!r} of a transit key")
    return path, int(key.version)


def _binding(context: DekContext) -> dict[str, str]:
    """Members of a request that bind the ciphertext to its disk and slot, beside the payload.

    The engine ignores ``context`` for keys that are not derived.
    """
    digest = _base64(context.digest())
    return {"associated_data": digest, "context": digest}


def _base64(value: bytes) -> str:
    return base64.b64encode(value).decode("ascii")


def _bytes(value: object) -> bytes:
    """Decode base64. The value may be a DEK, so errors do not show it."""
    if isinstance(value, str) and value.isascii():
        try:
            return base64.b64decode(value.encode(), validate=True)
        except binascii.Error:
            pass
    raise _senseless()


def _senseless() -> KeyProviderUnavailableError:
    return KeyProviderUnavailableError("the key vault's answer is invalid")

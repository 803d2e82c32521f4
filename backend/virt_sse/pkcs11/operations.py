"""Operations on the keys in a token, executed in the module's process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key
from PyKCS11 import (
    CKM_AES_KEY_GEN,
    CKM_RSA_PKCS_KEY_PAIR_GEN,
    Mechanism,
    PyKCS11Error,
)

from virt_sse.errors import (
    InvalidValueError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderUnavailableError,
    UnwrapError,
)
from virt_sse.pkcs11 import key_wrap, objects
from virt_sse.pkcs11.codes import LOST, MALFORMED, PROHIBITED, STALE, VAGUE
from virt_sse.pkcs11.connection import PAUSES, Connection
from virt_sse.pkcs11.module import Module
from virt_sse.pkcs11.objects import KeyKind, TokenKey
from virt_sse.pkcs11.pins import Logins
from virt_sse.pkcs11.rsa_oaep import OaepMode, RsaOaep
from virt_sse.pkcs11.transport import bring_in
from virt_sse.pkcs11.uri import TokenUri

T = TypeVar("T")

_LONGEST_LABEL = 255
_LONGEST_WRAPPED = 4096


class TokenOperations:
    """Implementation of :class:`~virt_sse.pkcs11.token.Token`, documented there. Not thread-safe.

    Sessions and handles are re-established transparently after a restart of the token or a concurrent change
    by another process.
    """

    def __init__(self, logins: Logins, uri: TokenUri, module: Path, reserved: str | None) -> None:
        self._connection = Connection(uri, Module(module, reserved), logins)
        self._handles: dict[object, tuple[int, Any]] = {}
        self._oaep = RsaOaep()

    def check(self) -> str | None:
        """Check the token; returns its serial number."""
        return self._connection.check()

    def oaep_modes(self) -> dict[str, OaepMode]:
        return dict(self._oaep.modes)

    def generate_rsa(self, label: str, key_id: bytes, bits: int) -> TokenKey:
        if bits not in objects.RSA_BITS:
            raise InvalidValueError(f"an RSA key must have {_choice(objects.RSA_BITS)} bits, not {bits}")
        templates = (
            objects.new_public_template(label, key_id, bits),
            objects.private_template(label, key_id),
            Mechanism(CKM_RSA_PKCS_KEY_PAIR_GEN, None),
        )
        return self._make(
            label, key_id, KeyKind.RSA, lambda session: session.generateKeyPair(*templates), is_own=True
        )

    def generate_aes(self, label: str, key_id: bytes) -> TokenKey:
        template, mechanism = objects.secret_template(label, key_id), Mechanism(CKM_AES_KEY_GEN, None)
        return self._make(
            label, key_id, KeyKind.AES, lambda session: session.generateKey(template, mechanism), is_own=True
        )

    def import_rsa(self, clear: bytes, label: str, key_id: bytes) -> TokenKey:
        private = load_der_private_key(clear, None)
        if not isinstance(private, rsa.RSAPrivateKey):
            raise InvalidValueError("the key is not an RSA key")
        if private.key_size not in objects.RSA_BITS:
            raise InvalidValueError(
                f"an RSA key must have {_choice(objects.RSA_BITS)} bits, not {private.key_size}"
            )
        return self._make(
            label,
            key_id,
            KeyKind.RSA,
            lambda session: bring_in(session, private, label, key_id),
            is_own=False,
        )

    def find(
        self,
        label: str | None = None,
        id: bytes | None = None,  # noqa: A002 -- PKCS#11's word
    ) -> list[TokenKey]:
        keys = self._find(label, id)
        for pause in PAUSES:
            if keys:
                break
            time.sleep(pause)
            self._connection.restart()
            keys = self._find(label, id)
        return sorted(
            keys, key=lambda key: (key.label, int.from_bytes(key.id, "big"), key.id, key.kind.value)
        )

    def is_enabled(self, key: TokenKey) -> bool:
        return self._with(key, "look at a key", lambda _session, _handle, found: found.is_enabled)

    def set_enabled(self, key: TokenKey, enabled: bool) -> None:
        def change(session: Any, handle: Any, _found: TokenKey) -> None:
            session.setAttributeValue(handle, objects.enabling_template(key.kind, enabled=enabled))

        self._with(key, "change a key", change)
        if self.is_enabled(key) is not enabled:
            raise KeyOperationUnsupportedError("the token does not support enabling and disabling keys")

    def destroy(self, key: TokenKey) -> None:
        def destroy(session: Any, handle: Any, _found: TokenKey) -> None:
            session.destroyObject(handle)
            if key.kind is KeyKind.RSA:
                for public in objects.public_handles(session, key.label, key.id):
                    with contextlib.suppress(PyKCS11Error):  # useless without the private key
                        session.destroyObject(public)

        self._with(key, "destroy a key", destroy)
        self._handles.pop(_identity(key), None)

    def oaep_encrypt(self, key: TokenKey, message: bytes, hash_name: str) -> bytes:
        def encrypt(session: Any, handle: Any, found: TokenKey) -> bytes:
            _require_enabled(found)
            return self._oaep.encrypt(session, handle, found, message, hash_name)

        return self._with(_rsa(key), "encrypt", encrypt)

    def oaep_decrypt(self, key: TokenKey, ciphertext: bytes, hash_name: str) -> bytes:
        def decrypt(session: Any, handle: Any, found: TokenKey) -> bytes | None:
            _require_enabled(found)
            return self._oaep.decrypt(session, handle, found, ciphertext, hash_name)

        message = self._with(_rsa(key), "decrypt", decrypt)
        if message is None:
            raise UnwrapError("the ciphertext is damaged, or was not made with this key")
        return message

    def aes_wrap(self, key: TokenKey, payload: bytes) -> bytes:
        if len(payload) < 16 or len(payload) % 8:
            raise InvalidValueError("AES key wrap takes 16 bytes or more, in multiples of 8")

        def wrap(session: Any, handle: Any, found: TokenKey) -> bytes:
            _require_enabled(found)
            return key_wrap.wrap(session, handle, payload)

        return self._with(_aes(key), "wrap", wrap)

    def aes_unwrap(self, key: TokenKey, wrapped: bytes) -> bytes:
        def unwrap(session: Any, handle: Any, found: TokenKey) -> bytes | None:
            _require_enabled(found)
            if len(wrapped) % 8 or not 24 <= len(wrapped) <= _LONGEST_WRAPPED:
                return None
            try:
                return key_wrap.unwrap(session, handle, wrapped)
            except PyKCS11Error as exc:
                if exc.value in MALFORMED:
                    return None
                if exc.value not in VAGUE:
                    raise
                # Bad ciphertext or broken token? A ciphertext made by the token itself tells.
                key_wrap.unwrap(session, handle, key_wrap.wrap(session, handle, bytes(16)))
                return None

        payload = self._with(_aes(key), "unwrap", unwrap)
        if payload is None:
            raise UnwrapError("the ciphertext is damaged, or was not made with this key")
        return payload

    def _run(self, what: str, work: Callable[[Any], T], *, is_repeatable: bool = True) -> T:
        try:
            return self._connection.run(what, work, is_repeatable=is_repeatable)
        except PyKCS11Error as exc:
            if exc.value in PROHIBITED:
                raise KeyOperationUnsupportedError(f"the token does not {what}: {exc}") from exc
            raise KeyProviderUnavailableError(f"the token cannot {what}: {exc}") from exc

    def _find(self, label: str | None, key_id: bytes | None) -> list[TokenKey]:
        return self._run(
            "list its keys",
            lambda session: [
                key for kind in KeyKind for _, key in objects.locate(session, kind, label, key_id)
            ],
        )

    def _with(self, key: TokenKey, what: str, work: Callable[[Any, Any, TokenKey], T]) -> T:
        """Call *work* with session, handle and current state of the key, and return its result.

        A key counts as gone only if missing from a freshly initialised module: a token after an
        interruption shows no keys, and SoftHSM hides a key while another process changes it.
        """
        for pause in (None, *PAUSES):
            if pause is not None:
                time.sleep(pause)
                self._connection.restart()
            done = self._run(what, lambda session: self._work(session, key, work))
            if done is not None:
                return done[0]
        raise KeyNotFoundError(f"the token holds no key {_name(key.label, key.id)}")

    def _work(self, session: Any, key: TokenKey, work: Callable[[Any, Any, TokenKey], T]) -> tuple[T] | None:
        """Call *work* on the key: its result in a tuple, or ``None`` when the key is not found."""
        generation, handle = self._handles.get(_identity(key), (0, None))
        if handle is not None and generation == self._connection.generation:
            try:
                found = objects.read(session, handle, key.kind)
                if found is not None and _is_same(found, key):
                    return (_worked(session, handle, found, work),)
            except PyKCS11Error as exc:
                if exc.value not in STALE:
                    raise
        located = objects.locate(session, key.kind, key.label, key.id)
        if len(located) > 1:
            name = _name(key.label, key.id)
            raise KeyProviderUnavailableError(f"the token holds {len(located)} keys {name}")
        if not located or not _is_same(located[0][1], key):
            return None
        self._handles[_identity(key)] = (self._connection.generation, located[0][0])
        try:
            return (_worked(session, *located[0], work),)
        except PyKCS11Error as exc:
            if exc.value not in STALE:
                raise
            return None

    def _make(
        self, label: str, key_id: bytes, kind: KeyKind, make: Callable[[Any], object], *, is_own: bool
    ) -> TokenKey:
        if not label or len(label.encode()) > _LONGEST_LABEL or not label.isprintable():
            raise InvalidValueError(f"a key's name must have 1 to {_LONGEST_LABEL} printable characters")
        if not key_id:
            raise InvalidValueError("a key in a token needs an id")
        if self._find(label, key_id):
            raise InvalidValueError(f"the token already holds a key {_name(label, key_id)}")
        self._run("make a key", make, is_repeatable=False)
        made = [key for key in self._find(label, key_id) if key.kind is kind]
        if len(made) != 1:
            raise KeyProviderUnavailableError(f"the token did not keep key {_name(label, key_id)}")
        if made[0].is_extractable or (is_own and not made[0].is_never_extractable):
            self.destroy(made[0])
            raise KeyOperationUnsupportedError("the token made an extractable key")
        return made[0]


def _worked(session: Any, handle: Any, found: TokenKey, work: Callable[[Any, Any, TokenKey], T]) -> T:
    try:
        return work(session, handle, found)
    except PyKCS11Error as exc:
        if exc.value in LOST | STALE:
            raise
        now = objects.read(session, handle, found.kind)
        if found.is_enabled and now is not None:
            _require_enabled(now)  # the key may have been disabled after the lookup
        raise


def _is_same(found: TokenKey, key: TokenKey) -> bool:
    return _identity(found) == _identity(key)


def _identity(key: TokenKey) -> object:
    return (key.kind, key.label, key.id, key.n, key.e)


def _require_enabled(key: TokenKey) -> None:
    if not key.is_enabled:
        raise KeyDisabledError(f"key {_name(key.label, key.id)} is disabled in the token")


def _rsa(key: TokenKey) -> TokenKey:
    if key.kind is not KeyKind.RSA:
        raise KeyOperationUnsupportedError(f"key {_name(key.label, key.id)} is not an RSA key")
    return key


def _aes(key: TokenKey) -> TokenKey:
    if key.kind is not KeyKind.AES:
        raise KeyOperationUnsupportedError(f"key {_name(key.label, key.id)} is not an AES key")
    return key


def _name(label: str, key_id: bytes) -> str:
    return f"{label!r} with id {key_id.hex()}"


def _choice(values: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"

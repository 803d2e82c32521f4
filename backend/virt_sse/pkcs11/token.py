"""A PKCS#11 token and operations on its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from virt_sse.pkcs11.objects import KeyKind, TokenKey
from virt_sse.pkcs11.operations import TokenOperations
from virt_sse.pkcs11.pins import GuardedPin, PinGuard, PinSource
from virt_sse.pkcs11.process import ModuleProcess
from virt_sse.pkcs11.rsa_oaep import OaepMode
from virt_sse.pkcs11.uri import TokenUri
from virt_sse.pkcs11.worker_user import WorkerUser

__all__ = ["KeyKind", "Token", "TokenKey"]

SECONDS = 20.0
"""Time limit for a token's answer; shorter than the libvirt hook's time limit for the agent."""

_MAKING_SECONDS = 600.0
"""Time limit for making a key: small tokens take minutes for an RSA key of 4096 bits."""


class Token:
    """A token, used through a separate process with a login. Open with :meth:`open`, and close after use.

    Safe to use from several threads. Every method raises
    :class:`~virt_sse.errors.KeyProviderUnavailableError` when the token is absent, does not answer or rejects
    the PIN; such an error says nothing about a key. Sessions and handles are re-established transparently
    after a fork, the end of the module's process, a restart of the token or a concurrent change by another
    process.

    Label, id and, for RSA, the modulus identify a key. Any use of a key, even of its public half, first
    checks with the token that the key exists and is enabled.

    :ivar serial: the token's serial number.
    """

    def __init__(self, process: ModuleProcess[TokenOperations], seconds: float) -> None:
        self._process = process
        self._seconds = seconds
        self.serial: str | None = None

    @classmethod
    def open(
        cls,
        uri: TokenUri,
        module: Path,
        pin: PinSource,
        *,
        guard: PinGuard,
        reserved: str | None = None,
        environment: Mapping[str, str] | None = None,
        user: WorkerUser | None = None,
        seconds: float = SECONDS,
    ) -> Self:
        """Find the token and log in.

        :param uri: must match exactly one token. The serial of the first match is kept: a later match with
            another serial is an error.
        :param module: the module's absolute path.
        :param guard: counts wrong PINs; each token needs its own.
        :param reserved: see :class:`~virt_sse.pkcs11.module.Module`.
        :param environment: environment variables for the module.
        :param user: user of the module's process; the caller's by default.
        :param seconds: time limit for each answer of the token.
        :raise ConfigError: When the configured source does not provide a PIN.
        """
        process = ModuleProcess(
            *(TokenOperations, uri, module, reserved),
            logins=GuardedPin(pin, guard),
            environment=environment or {},
            user=user,
            seconds=seconds,
        )
        token = cls(process, seconds)
        try:
            token.serial = token.check()
        except BaseException:
            token.close()
            raise
        process.make_of(dataclasses.replace(uri, serial=token.serial or None), module, reserved)
        return token

    @property
    def pid(self) -> int | None:
        """ID of the module's process, if running."""
        return self._process.pid

    def check(self) -> str | None:
        """Check that the token is present and answers.

        :return: the token's serial number.
        :raise KeyProviderUnavailableError: When the token is absent or does not answer.
        """
        return self._process.call(self._seconds, TokenOperations.check)

    def close(self) -> None:
        """End the session. Raises nothing; a later use reopens the token."""
        self._process.close()

    def oaep_modes(self) -> dict[str, OaepMode]:
        """Mode of OAEP by hash name, for hashes used so far."""
        return self._process.call(self._seconds, TokenOperations.oaep_modes)

    def generate_rsa(self, label: str, key_id: bytes, bits: int) -> TokenKey:
        """Make an RSA pair; its private half decrypts only, and is never extractable.

        :raise InvalidValueError: When the size is not in :data:`objects.RSA_BITS`, or the name is invalid or
            taken.
        :raise KeyOperationUnsupportedError: When the token does not support such keys.
        """
        return self._process.call(_MAKING_SECONDS, TokenOperations.generate_rsa, label, key_id, bits)

    def generate_aes(self, label: str, key_id: bytes) -> TokenKey:
        """Make an AES key of 256 bits; the key wraps and unwraps only, and is never extractable.

        :raise: As :meth:`generate_rsa`.
        """
        return self._process.call(_MAKING_SECONDS, TokenOperations.generate_aes, label, key_id)

    def import_rsa(self, private: rsa.RSAPrivateKey, label: str, key_id: bytes) -> TokenKey:
        """Import a private key by wrapped transfer: the key never passes the module's interface in clear.

        The imported key then behaves like a generated one, except that the token does not report the key as
        "never extractable".

        :raise: As :meth:`generate_rsa`.
        """
        clear = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return self._process.call(_MAKING_SECONDS, TokenOperations.import_rsa, clear, label, key_id)

    def find(
        self,
        label: str | None = None,
        id: bytes | None = None,  # noqa: A002 -- PKCS#11's word
    ) -> list[TokenKey]:
        """RSA and AES keys with this label and id, sorted by label, then by id as a number."""
        return self._process.call(self._seconds, TokenOperations.find, label, id)

    def is_enabled(self, key: TokenKey) -> bool:
        """Whether the key is enabled now.

        :raise KeyNotFoundError: When the key no longer exists.
        """
        return self._process.call(self._seconds, TokenOperations.is_enabled, key)

    def set_enabled(self, key: TokenKey, enabled: bool) -> None:
        """Enable or disable the key for all users of the token.

        :raise KeyNotFoundError: When the key no longer exists.
        :raise KeyOperationUnsupportedError: When the token does not allow the change.
        """
        self._process.call(self._seconds, TokenOperations.set_enabled, key, enabled)

    def destroy(self, key: TokenKey) -> None:
        """Destroy the key permanently.

        :raise KeyNotFoundError: When the key no longer exists.
        :raise KeyOperationUnsupportedError: When the token does not allow destroying keys.
        """
        self._process.call(self._seconds, TokenOperations.destroy, key)

    def oaep_encrypt(self, key: TokenKey, message: bytes, hash_name: str) -> bytes:
        """Encrypt by RSAES-OAEP (RFC 8017 §7.1.1), with the same hash for MGF1 and an empty label.

        :param hash_name: ``sha1`` or ``sha256``.
        :raise KeyNotFoundError: When the key no longer exists.
        :raise KeyDisabledError: When the key is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.oaep_encrypt, key, message, hash_name)

    def oaep_decrypt(self, key: TokenKey, ciphertext: bytes, hash_name: str) -> bytes:
        """Decrypt a ciphertext of :meth:`oaep_encrypt`.

        :raise UnwrapError: When the ciphertext is invalid; the message does not tell the reason.
        :raise KeyNotFoundError: When the key no longer exists.
        :raise KeyDisabledError: When the key is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.oaep_decrypt, key, ciphertext, hash_name)

    def aes_wrap(self, key: TokenKey, payload: bytes) -> bytes:
        """Wrap *payload* by AES key wrap (RFC 3394); the result is 8 bytes longer.

        :param payload: at least 16 bytes, a multiple of 8.
        :raise KeyNotFoundError: When the key no longer exists.
        :raise KeyDisabledError: When the key is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.aes_wrap, key, payload)

    def aes_unwrap(self, key: TokenKey, wrapped: bytes) -> bytes:
        """Unwrap the payload of *wrapped*.

        :raise UnwrapError: When *wrapped* is invalid; the message does not tell the reason.
        :raise KeyNotFoundError: When the key no longer exists.
        :raise KeyDisabledError: When the key is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.aes_unwrap, key, wrapped)

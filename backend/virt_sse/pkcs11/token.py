"""A PKCS#11 token, and what is done with the keys in it."""

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

__all__ = ["KeyKind", "Token", "TokenKey"]

SECONDS = 20.0
"""In which a token has to answer: less than what the libvirt hook gives the agent."""

_MAKING_SECONDS = 600.0
"""In which it has to make a key: small ones take minutes for an RSA key of 4096 bits."""


class Token:
    """A token, used by a process that is logged in to it. Get it by :meth:`open`, and close it. Safe to use
    from several threads.

    Every method raises :class:`~virt_sse.errors.KeyProviderUnavailableError` when the token does not answer,
    is not there or takes no PIN; none of that says anything about a key. What is lost by a fork, by the end
    of that process, by a restart of the token or because another process was at work is had anew without the
    caller noticing.

    A key is meant by its label, its id and, for RSA, its modulus. It is used, public half included, only if
    the token itself says at that moment that it is there and enabled.

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
        seconds: float = SECONDS,
    ) -> Self:
        """Find the token and log in.

        :param uri: which token; it has to be one, and stays the one that was found first.
        :param module: the module's absolute path.
        :param guard: counts wrong PINs; one for each token.
        :param reserved: see :class:`~virt_sse.pkcs11.module.Module`.
        :param environment: what the module is to find in its environment.
        :param seconds: in which the token has to answer.
        :raise ConfigError: When the PIN cannot be had as configured.
        """
        process = ModuleProcess(
            *(TokenOperations, uri, module, reserved),
            logins=GuardedPin(pin, guard),
            environment=environment or {},
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
        """The process, if there is one now."""
        return self._process.pid

    def check(self) -> str | None:
        """Make sure that the token is there and answers.

        :return: its serial number.
        :raise KeyProviderUnavailableError: When it does not.
        """
        return self._process.call(self._seconds, TokenOperations.check)

    def close(self) -> None:
        """End the session. Raises nothing; used again, the token is opened again."""
        self._process.close()

    def oaep_modes(self) -> dict[str, OaepMode]:
        """By name of the hash: where OAEP is done, as far as that was tried."""
        return self._process.call(self._seconds, TokenOperations.oaep_modes)

    def generate_rsa(self, label: str, key_id: bytes, bits: int) -> TokenKey:
        """Make a pair whose private half decrypts, does nothing else, and is never extractable.

        :raise InvalidValueError: When the size is not in :data:`objects.RSA_BITS`, the name none or taken.
        :raise KeyOperationUnsupportedError: When the token does not make such keys.
        """
        return self._process.call(_MAKING_SECONDS, TokenOperations.generate_rsa, label, key_id, bits)

    def generate_aes(self, label: str, key_id: bytes) -> TokenKey:
        """Make a key of 256 bits that wraps and unwraps, does nothing else, and is never extractable.

        :raise: As :meth:`generate_rsa`.
        """
        return self._process.call(_MAKING_SECONDS, TokenOperations.generate_aes, label, key_id)

    def import_rsa(self, private: rsa.RSAPrivateKey, label: str, key_id: bytes) -> TokenKey:
        """Bring a private key in, by wrapped transfer: it never passes the module's interface in clear.

        From then on it is as one that was made inside, but that the token does not call it never extractable.

        :raise: As :meth:`generate_rsa`.
        """
        clear = private.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return self._process.call(_MAKING_SECONDS, TokenOperations.import_rsa, clear, label, key_id)

    def find(
        self,
        label: str | None = None,
        id: bytes | None = None,  # noqa: A002 -- PKCS#11's word
    ) -> list[TokenKey]:
        """The RSA and AES keys of that label and that id; by label, then by id as a number."""
        return self._process.call(self._seconds, TokenOperations.find, label, id)

    def is_enabled(self, key: TokenKey) -> bool:
        """Whether the key can be used now.

        :raise KeyNotFoundError: When it is not there any more.
        """
        return self._process.call(self._seconds, TokenOperations.is_enabled, key)

    def set_enabled(self, key: TokenKey, enabled: bool) -> None:
        """Allow or refuse the key's use, for all who use the token.

        :raise KeyNotFoundError: When it is not there any more.
        :raise KeyOperationUnsupportedError: When the token does not allow that.
        """
        self._process.call(self._seconds, TokenOperations.set_enabled, key, enabled)

    def destroy(self, key: TokenKey) -> None:
        """Destroy the key, for good.

        :raise KeyNotFoundError: When it is not there any more.
        :raise KeyOperationUnsupportedError: When the token does not allow that.
        """
        self._process.call(self._seconds, TokenOperations.destroy, key)

    def oaep_encrypt(self, key: TokenKey, message: bytes, hash_name: str) -> bytes:
        """RSAES-OAEP (RFC 8017 §7.1.1), the hash also for MGF1, no label.

        :param hash_name: ``sha1`` or ``sha256``.
        :raise KeyNotFoundError: When the key is not there any more.
        :raise KeyDisabledError: When it is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.oaep_encrypt, key, message, hash_name)

    def oaep_decrypt(self, key: TokenKey, ciphertext: bytes, hash_name: str) -> bytes:
        """The message in *ciphertext*; see :meth:`oaep_encrypt`.

        :raise UnwrapError: When there is none; always in the same words.
        :raise KeyNotFoundError: When the key is not there any more.
        :raise KeyDisabledError: When it is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.oaep_decrypt, key, ciphertext, hash_name)

    def aes_wrap(self, key: TokenKey, payload: bytes) -> bytes:
        """AES key wrap (RFC 3394): 8 bytes more than *payload*, whose length is a multiple of 8, from 16.

        :raise KeyNotFoundError: When the key is not there any more.
        :raise KeyDisabledError: When it is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.aes_wrap, key, payload)

    def aes_unwrap(self, key: TokenKey, wrapped: bytes) -> bytes:
        """The payload in *wrapped*.

        :raise UnwrapError: When there is none; always in the same words.
        :raise KeyNotFoundError: When the key is not there any more.
        :raise KeyDisabledError: When it is disabled.
        """
        return self._process.call(self._seconds, TokenOperations.aes_unwrap, key, wrapped)

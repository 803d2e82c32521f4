"""A vault's root key sealed by a key in a PKCS#11 token: the file ``root.sealed``.

The key in the token wraps the root key, and never leaves the token; without the token, the file is useless.
``backend/docs/formats.md`` describes the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec

from virt_sse import pkcs11
from virt_sse.errors import InvalidValueError, UnwrapError, VaultError, VirtSseError
from virt_sse.pkcs11.uri import TokenUri
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.vault.home.sealing import ROOT_KEY_BYTES, VaultRootKey

if TYPE_CHECKING:
    from virt_sse.pkcs11.options import TokenOptions
    from virt_sse.pkcs11.token import Token, TokenKey
    from virt_sse.pkcs11.versions import VersionedKeys

_CONTEXT = b"virt-sse vault sealed root v1\0"
_RSA, _AES = "RSA-OAEP-256", "A256KW"
_ALGORITHMS = {"rsa": _RSA, "aes": _AES}
_HASH = "sha256"


@dataclass(frozen=True, slots=True)
class SealingKey:
    """The key in a token that seals a root key.

    :ivar token: the token, as in :class:`~virt_sse.pkcs11.options.TokenOptions`.
    :ivar label: the key's label.
    :ivar version: the key's id in hexadecimal; ``None`` for the newest key with the label.
    """

    token: Mapping[str, str]
    label: str
    version: str | None = None

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Self:
        """Take the key out of the URI in *options*, which names the token too.

        :raise InvalidValueError: When the URI is malformed, or does not name token and key.
        """
        uri = TokenUri.parse(options["uri"])
        token = dataclasses.replace(uri, object=None, id=None, type=None)
        if not uri.object or not token.names_a_token or uri.type not in (None, "private", "secret-key"):
            raise InvalidValueError(
                f"{options['uri'][:200]!r} does not name a token and a key in the token",
                hint="e.g. 'pkcs11:token=LABEL;object=KEY'",
            )
        return cls({**options, "uri": str(token)}, uri.object, uri.id.hex() if uri.id else None)


class SealedRoot(
    msgspec.Struct,
    frozen=True,
    forbid_unknown_fields=True,
    tag_field="format",
    tag="virt-sse-vault-sealed-root-1",
):
    """The sealed root key.

    :ivar vault: the vault's tenant and name.
    :ivar token: as in :class:`SealingKey`. May be changed; everything else is authenticated.
    :ivar key: the label of the sealing key.
    :ivar version: the id of the sealing key, in hexadecimal.
    :ivar algorithm: JOSE name (RFC 7518 §4.1): ``RSA-OAEP-256`` or ``A256KW``.
    :ivar wrapped: root key and context, wrapped in the token.
    """

    vault: str
    token: Mapping[str, str]
    key: str
    version: str
    algorithm: str
    wrapped: bytes

    def to_json(self) -> bytes:
        """Encode the file."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    @classmethod
    def from_json(cls, document: bytes) -> Self:
        """Decode the file.

        :raise VaultError: When *document* is malformed.
        """
        try:
            return from_json(document, cls)
        except DocumentError as exc:
            raise VaultError(f"the sealed root key is damaged: {exc}") from exc

    @property
    def sealing_key(self) -> SealingKey:
        """The key, without its version: the newest one seals next."""
        return SealingKey(self.token, self.key)

    def context(self) -> bytes:
        """What the payload is bound to; 32 bytes."""
        parts = (self.vault, self.algorithm, self.version, self.key)
        return hashlib.sha256(_CONTEXT + "\0".join(parts).encode()).digest()


def seal(root: VaultRootKey, by: SealingKey, folder: Path, *, new_key: bool = False) -> SealedRoot:
    """Seal *root*, and prove by unsealing in a new session that the result opens.

    :param folder: see :func:`token_options`.
    :param new_key: first make the key in the token, or a new version of it: AES, 256 bits, not extractable.
    :raise VaultError: When the token, its PIN or the key cannot be used.
    """
    with _failures("seal"), _opened(by.token, folder) as keys:
        found = _find(keys, by, new_key=new_key)
        algorithm = _ALGORITHMS[found.kind.value]
        sealed = SealedRoot(root.vault, by.token, by.label, found.id.hex(), algorithm, b"")
        payload = root.material + sealed.context()
        if algorithm == _RSA:
            wrapped = keys.token.oaep_encrypt(found, payload, _HASH)
        else:
            wrapped = keys.token.aes_wrap(found, payload)
        sealed = msgspec.structs.replace(sealed, wrapped=wrapped)
    if unseal(SealedRoot.from_json(sealed.to_json()), root.vault, folder).material != root.material:
        raise VaultError("cannot seal the vault's root key: the token returns another key")
    return sealed


def unseal(sealed: SealedRoot, vault: str, folder: Path) -> VaultRootKey:
    """Unseal the root key of the vault with tenant and name *vault*.

    :param folder: see :func:`token_options`.
    :raise VaultError: When the token, its PIN or the key cannot be used, or *sealed* was altered, or is of
        another vault.
    """
    if sealed.vault != vault:
        raise VaultError(f"the sealed root key is of another vault, {sealed.vault[:80]}")
    with _failures("unseal"), _opened(sealed.token, folder) as keys:
        try:
            payload = keys.use(sealed.key, sealed.version, lambda key: _unwrap(keys.token, key, sealed))
        except UnwrapError:
            payload = b""
    material, context = payload[:ROOT_KEY_BYTES], payload[ROOT_KEY_BYTES:]
    if not hmac.compare_digest(context, sealed.context()):
        raise VaultError(
            "cannot unseal the vault's root key: the sealed key was altered, or the token has another key"
        )
    return VaultRootKey(material, vault)


def token_options(token: Mapping[str, str], folder: Path) -> TokenOptions:
    """The token of a sealing key.

    :param folder: has the count of wrong PINs.
    :raise ConfigError: When *token* is invalid, or PyKCS11 is not installed.
    """
    pkcs11.require()
    from virt_sse.pkcs11.options import TokenOptions

    return TokenOptions.parse("the sealing of the root key", folder, token)


def _unwrap(token: Token, key: TokenKey, sealed: SealedRoot) -> bytes:
    if sealed.algorithm != _ALGORITHMS[key.kind.value]:
        raise UnwrapError(f"the key does not wrap by {sealed.algorithm[:40]!r}")
    if sealed.algorithm == _RSA:
        return token.oaep_decrypt(key, sealed.wrapped, _HASH)
    return token.aes_unwrap(key, sealed.wrapped)


@contextlib.contextmanager
def _opened(token: Mapping[str, str], folder: Path) -> Iterator[VersionedKeys]:
    options = token_options(token, folder)
    from virt_sse.pkcs11.versions import VersionedKeys

    with contextlib.closing(options.open()) as opened:
        yield VersionedKeys(opened)


def _find(keys: VersionedKeys, by: SealingKey, *, new_key: bool) -> TokenKey:
    from virt_sse.pkcs11.token import KeyKind
    from virt_sse.pkcs11.versions import require_strength

    if by.version is not None and new_key:
        raise InvalidValueError("a new key gets an id of its own", hint="leave 'id' out of the URI")
    if by.version is not None:
        return require_strength(keys.get(by.label, by.version))
    if not new_key:
        return require_strength(keys.current(by.label))
    if keys.token.find(label=by.label):
        return keys.rotate(by.label)
    return keys.create(by.label, KeyKind.AES, 256)


@contextlib.contextmanager
def _failures(doing: str) -> Iterator[None]:
    try:
        yield
    except VirtSseError as exc:
        raise VaultError(f"cannot {doing} the vault's root key: {exc}", hint=exc.hint) from exc

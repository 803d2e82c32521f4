"""A vault's root key in its folder: as a file in the clear, or sealed by a key in a PKCS#11 token.

While the root key is sealed or unsealed, both files exist for a moment, and have the same root key. A killed
command is repeated.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import msgspec

from virt_sse.errors import VaultError
from virt_sse.system.files import sync_folder, write_private
from virt_sse.vault.home.database import Database, failures_named
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.sealing import TOKENS, VaultRootKey
from virt_sse.vault.home.settings import VaultSettings
from virt_sse.vault.hsm import sealed_root
from virt_sse.vault.hsm.sealed_root import SealedRoot, SealingKey
from virt_sse.vault.identity.tokens import signing_key

_log = logging.getLogger(__name__)


def read_root_key(directory: VaultDirectory, settings: VaultSettings) -> VaultRootKey:
    """Read the root key, through the token if the key is sealed.

    :raise VaultError: When the key is missing or damaged, or the token does not unseal the key.
    """
    if is_sealed(directory) and (sealed := sealed_root_key(directory)):
        return sealed_root.unseal(sealed, settings.identity, directory.sealing_path)
    if directory.sealed_root_path.exists():
        _log.warning(
            "the vault's root key is in the clear in %s, beside the sealed key: run 'virt-sse vault "
            "seal-root' or 'unseal-root' again",
            directory.root_key_path,
        )
    return VaultRootKey(directory.read(directory.root_key_path), settings.identity)


def is_sealed(directory: VaultDirectory) -> bool:
    """Whether the root key is sealed, and not in the clear as well."""
    return directory.sealed_root_path.exists() and not directory.root_key_path.exists()


def has_root_key(directory: VaultDirectory) -> bool:
    """Whether the folder has a root key, sealed or not."""
    return directory.root_key_path.exists() or directory.sealed_root_path.exists()


def sealed_root_key(directory: VaultDirectory) -> SealedRoot | None:
    """Read the sealed root key; ``None`` if there is none.

    :raise VaultError: When the file is damaged or cannot be read.
    """
    path = directory.sealed_root_path
    return SealedRoot.from_json(directory.read(path)) if path.exists() else None


def check_root_key(url: str, root: VaultRootKey) -> None:
    """Check that the database at *url* is the vault's.

    :raise VaultError: When it is not, or the database cannot be read.
    """
    with failures_named(), contextlib.closing(Database(url)) as database:
        signing_key(database, root.sealer(TOKENS))


def seal_root(
    directory: VaultDirectory, by: SealingKey | None = None, *, new_key: bool = False
) -> SealedRoot:
    """Seal the root key by a key in a token, or seal it anew, while the vault is not served.

    The root key in the clear is removed once the sealed key has been proved to open.

    :param by: by default, for a sealed root key, the newest version of the present sealing key.
    :param new_key: first make the key in the token, or a new version.
    :raise VaultError: When a process serves the vault, its database cannot be read, the root key is not the
        database's, or the token, its PIN or the key cannot be used; the root key stays as it was.
    """
    settings = directory.settings()
    with directory.lock():
        if by is None:
            present = sealed_root_key(directory)
            if present is None:
                raise VaultError("the root key is not sealed yet", hint="name token and key by --seal-uri")
            by = present.sealing_key
        else:
            forget_wrong_pins(directory, by)
        root = read_root_key(directory, settings)
        check_root_key(directory.database_url(settings), root)
        sealed = sealed_root.seal(root, by, directory.sealing_path, new_key=new_key)
        _replace(directory.sealed_root_path, sealed.to_json(), directory.root_key_path)
    return sealed


def write_sealed(
    directory: VaultDirectory, root: VaultRootKey, by: SealingKey, *, new_key: bool = False
) -> None:
    """Write the root key of a new folder, sealed.

    :param new_key: first make the key in the token, or a new version.
    :raise VaultError: When the token, its PIN or the key cannot be used.
    :raise OSError: When the file cannot be written.
    """
    forget_wrong_pins(directory, by)
    sealed = sealed_root.seal(root, by, directory.sealing_path, new_key=new_key)
    write_private(directory.sealed_root_path, sealed.to_json())


def unseal_root(directory: VaultDirectory) -> None:
    """Write the sealed root key back into a file in the clear, while the vault is not served.

    :raise VaultError: When a process serves the vault, the root key is not sealed, or is not the database's,
        or the token does not unseal the key.
    """
    settings = directory.settings()
    with directory.lock():
        if not directory.sealed_root_path.exists():
            raise VaultError("the vault's root key is not sealed")
        root = read_root_key(directory, settings)
        check_root_key(directory.database_url(settings), root)
        _replace(directory.root_key_path, root.material, directory.sealed_root_path)


def unlock_sealing(directory: VaultDirectory) -> bool:
    """Reset the count of wrong PINs at the token that seals the root key, and unseal.

    :return: whether the root key is sealed.
    :raise VaultError: When the token does not unseal the key.
    """
    settings, sealed = directory.settings(), sealed_root_key(directory)
    if sealed is None:
        return False
    forget_wrong_pins(directory, sealed.sealing_key)
    sealed_root.unseal(sealed, settings.identity, directory.sealing_path)
    return True


def forget_wrong_pins(directory: VaultDirectory, by: SealingKey) -> None:
    """Forget earlier wrong PINs: the operator has just named the PIN file.

    :raise ConfigError: When the options of the token are invalid.
    """
    sealed_root.token_options(by.token, directory.sealing_path).guard.reset()


def reached_by(sealed: SealedRoot, to: SealingKey) -> SealedRoot:
    """The same sealed key, whose sealing key is reached as *to* says.

    :raise VaultError: When *to* names another key.
    """
    if to.label != sealed.key or to.version not in (None, sealed.version):
        raise VaultError(
            f"the root key is sealed by key {sealed.key!r}, version {sealed.version}",
            hint="name this key by --seal-uri, and seal by another key afterwards with 'vault seal-root'",
        )
    return msgspec.structs.replace(sealed, token=to.token)


def _replace(path: Path, content: bytes, before: Path) -> None:
    try:
        write_private(path, content)
        before.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as exc:
        raise VaultError(f"cannot replace {before} by {path}: {exc.strerror}") from exc

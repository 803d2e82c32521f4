"""The export of a vault's root key: who can read it, and what it makes."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from support.command_line import CommandLine
from support.vault_doubles import Records
from support.vault_tools import OAEP
from virt_sse.errors import CredentialError, InvalidValueError, VaultError
from virt_sse.system.files import write_private
from virt_sse.vault.backup import back_up, restore
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.keys.records import NewKey
from virt_sse.vault.root_export import Passphrase, Recipient, export_root, import_root
from virt_sse.vault.vault import open_vault

SECRET = Recipient.new_key_pair()


def key_pair(folder: Path, name: str = "recipient") -> tuple[Path, Path]:
    """A new key pair as OpenSSL writes it: the private and the public file."""
    key = X25519PrivateKey.generate()
    private, public = folder / f"{name}.key", folder / f"{name}.pem"
    write_private(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_commands_move_a_vault_to_another_machine(
    directory: VaultDirectory, tmp_path: Path, root: Path
) -> None:
    with open_vault(directory, Records()) as vault:
        vault.keys.create("kek", "RSA", 2048, NewKey())
        sealed = vault.keys.encrypt("wrapKey", "kek", "", OAEP, b"dek")[1]
    virt_sse, file, new = CommandLine(root), tmp_path / "export", tmp_path / "new"
    private, public = key_pair(tmp_path)
    virt_sse("vault", "export-root", file, "-d", directory.path, "--recipient", public)
    back_up(directory, tmp_path / "backup")
    assert file.stat().st_mode & 0o777 == 0o600
    for secret in (directory.root_key_path, directory.ca_key_path):
        content = secret.read_bytes()
        assert content not in file.read_bytes()
        assert base64.b64encode(content) not in file.read_bytes()
    virt_sse("vault", "import-root", file, "-d", new, "--host", "vault-2.example", "--identity", private)
    made = VaultDirectory(new)
    with pytest.raises(VaultError, match="vault lacks"), open_vault(made, Records()):
        pass  # no empty vault takes the place of the lost one
    restore(made, tmp_path / "backup")
    with open_vault(made, Records()) as vault:
        assert vault.keys.decrypt("unwrapKey", "kek", "", OAEP, sealed)[1] == b"dek"
    assert made.settings().hosts == (*directory.settings().hosts, "vault-2.example")
    assert made.ca_path.read_bytes() == directory.ca_path.read_bytes()
    assert made.server_path.read_bytes() != directory.server_path.read_bytes()
    assert all(path.stat().st_mode & 0o077 == 0 for path in [new, *new.iterdir()])
    write_private(tmp_path / "passphrase", b"a long passphrase\n")
    passphrase = ("--passphrase-file", tmp_path / "passphrase")
    assert "File exists" in virt_sse.refuses("vault", "export-root", file, "-d", directory.path, *passphrase)
    virt_sse("vault", "export-root", tmp_path / "second", "-d", directory.path, *passphrase)
    refused = virt_sse.refuses("vault", "import-root", tmp_path / "second", "-d", new, *passphrase)
    assert "has a vault already" in refused  # and the passphrase is the right one


def test_without_a_terminal_a_secret_has_to_be_named(
    directory: VaultDirectory, tmp_path: Path, root: Path
) -> None:
    virt_sse = CommandLine(root)
    refused = virt_sse.refuses("vault", "export-root", tmp_path / "export", "-d", directory.path, status=2)
    assert "no terminal to ask on" in refused
    assert not (tmp_path / "export").exists()
    export_root(directory, tmp_path / "export", SECRET)
    assert "no terminal to ask on" in virt_sse.refuses(
        "vault", "import-root", tmp_path / "export", "-d", tmp_path / "new", status=2
    )
    url = "postgresql://user:secret@db.example/vault"
    refused = virt_sse.refuses("vault", "init", "-d", tmp_path / "new", "--database", url, status=2)
    assert "a password on the command line" in refused


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another vault": lambda document: document | {"vault": "https://elsewhere.test"},
    "another salt": lambda document: document | {"salt": base64.b64encode(bytes(16)).decode()},
    "a part of it": lambda document: document | {"sealed": document["sealed"][:-8]},
    "another lock": lambda document: document | {"lock": "passphrase"},
    "another format": lambda document: document | {"format": "virt-sse-vault-root-2"},
    "nothing": lambda _document: {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_altered_export_makes_nothing(directory: VaultDirectory, tmp_path: Path, change: str) -> None:
    file = tmp_path / "export"
    export_root(directory, file, SECRET)
    file.write_text(json.dumps(CHANGES[change](json.loads(file.read_text()))))
    with pytest.raises(VaultError, match=r"cannot decrypt|no export|encrypted under a passphrase"):
        import_root(file, tmp_path / "new", SECRET)
    assert not (tmp_path / "new").exists()


def test_another_secret_opens_nothing(directory: VaultDirectory, tmp_path: Path) -> None:
    export_root(directory, tmp_path / "one", Passphrase("a passphrase of a test"))
    with pytest.raises(VaultError, match=r"cannot decrypt .*another passphrase"):
        import_root(tmp_path / "one", tmp_path / "new", Passphrase("another passphrase"))
    export_root(directory, tmp_path / "two", Recipient.read_public(key_pair(tmp_path)[1]))
    stranger = Recipient.read_private(key_pair(tmp_path, "stranger")[0])
    with pytest.raises(VaultError, match=r"cannot decrypt .*another recipient"):
        import_root(tmp_path / "two", tmp_path / "new", stranger)
    with pytest.raises(VaultError, match="encrypted for a recipient, not under a passphrase"):
        import_root(tmp_path / "two", tmp_path / "new", Passphrase("another passphrase"))


def test_weak_and_exposed_secrets_are_refused(directory: VaultDirectory, tmp_path: Path) -> None:
    private, _ = key_pair(tmp_path)
    private.chmod(0o640)
    with pytest.raises(CredentialError, match="open to others"):
        Recipient.read_private(private)
    with pytest.raises(InvalidValueError, match="no public X25519 key"):
        Recipient.read_public(directory.ca_path)
    with pytest.raises(InvalidValueError, match="at least 12 characters"):
        Passphrase("short")
    exposed = tmp_path / "passphrase"
    exposed.write_text("a long passphrase\n")
    exposed.chmod(0o644)
    with pytest.raises(CredentialError, match="open to others"):
        Passphrase.read(exposed)
    assert "a passphrase" not in repr(Passphrase("a passphrase of a test"))

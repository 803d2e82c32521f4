"""A root key sealed by a key in a token: what opens it, what does not, and what a killed command leaves."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from support import faults
from support.command_line import CommandLine
from support.postgresql import PostgresqlServer
from support.vault_doubles import Records
from virt_sse.errors import InvalidValueError, VaultError
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.pkcs11.objects import KeyKind
from virt_sse.pkcs11.pins import MOST_WRONG
from virt_sse.pkcs11.versions import VersionedKeys
from virt_sse.system.files import write_private
from virt_sse.vault import root_key
from virt_sse.vault.backup import back_up, restore
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.hsm.sealed_root import SealingKey
from virt_sse.vault.initialise import initialise
from virt_sse.vault.root_export import Recipient, export_root, import_root
from virt_sse.vault.root_key import read_root_key, seal_root, unlock_sealing, unseal_root
from virt_sse.vault.vault import open_vault

SECRET = Recipient.new_key_pair()


@pytest.fixture(scope="module")
def token(lab_hsm: LabHsm) -> Iterator[LabToken]:
    with lab_hsm.token() as token:
        yield token


@pytest.fixture(scope="module")
def pair(token: LabToken) -> str:
    """The label of an RSA key in the token."""
    with closing(token.open()) as opened:
        return VersionedKeys(opened).create("pair", KeyKind.RSA, 2048).label


@pytest.fixture
def by(token: LabToken) -> SealingKey:
    """A sealing key that is yet to be made."""
    return SealingKey({name: str(value) for name, value in token.options.items()}, secrets.token_hex(4))


def opens(directory: VaultDirectory) -> bool:
    with open_vault(directory, Records()) as vault:
        return vault.settings.name == "vault"


def content(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def test_a_vault_is_sealed_served_sealed_anew_and_unsealed(
    directory: VaultDirectory, by: SealingKey, pair: str, tmp_path: Path
) -> None:
    root = directory.root_key_path.read_bytes()
    back_up(directory, tmp_path / "backup")
    first = seal_root(directory, by, new_key=True)
    assert root not in content(directory.path)
    assert directory.sealed_root_path.stat().st_mode & 0o777 == 0o600
    assert opens(directory)
    second = seal_root(directory, new_key=True)
    assert (first.key, first.algorithm) == (second.key, "A256KW")
    assert first.version != second.version
    assert seal_root(directory, replace(by, label=pair)).algorithm == "RSA-OAEP-256"
    assert opens(directory)
    directory.database_path.unlink()
    restore(directory, tmp_path / "backup")
    unseal_root(directory)
    assert directory.root_key_path.read_bytes() == root
    assert not directory.sealed_root_path.exists()
    with pytest.raises(VaultError, match="not sealed"):
        unseal_root(directory)


def test_what_does_not_open_it_says_why_and_the_vault_stays(
    directory: VaultDirectory, by: SealingKey, token: LabToken, tmp_path: Path
) -> None:
    with pytest.raises(VaultError, match=f"cannot seal .* holds no key '{by.label}'"):
        seal_root(directory, by)
    with pytest.raises(VaultError, match=r"cannot seal .*no PKCS#11 module"):
        seal_root(directory, replace(by, token={**by.token, "module": "no-such-module"}))
    assert directory.root_key_path.exists()
    seal_root(directory, by, new_key=True)
    document = json.loads(directory.sealed_root_path.read_text())

    def refused(**changes: object) -> str:
        write_private(directory.sealed_root_path, json.dumps(document | changes).encode())
        with pytest.raises(VaultError) as caught:
            read_root_key(directory, directory.settings())
        return str(caught.value)

    pin = tmp_path / "pin"
    write_private(pin, b"wrong\n")
    wrong = {"token": {**by.token, "pin-file": str(pin)}}
    for _ in range(MOST_WRONG):
        assert "PIN" in refused(**wrong)
    assert "locked after 3 wrong PINs" in refused(**wrong)
    write_private(directory.sealed_root_path, json.dumps(document).encode())
    assert unlock_sealing(directory)
    pin.chmod(0o640)
    assert "accessible to other users" in refused(**wrong)
    for change in ({"wrapped": "AAAA"}, {"algorithm": "RSA-OAEP-256"}):
        assert "altered" in refused(**change)
    assert "of another vault" in refused(vault="tenant/other")
    assert "holds no version" in refused(version="00")
    assert "damaged" in refused(format="virt-sse-vault-sealed-root-2")
    with closing(token.open()) as opened:
        (key,) = opened.find(label=by.label)
        opened.set_enabled(key, False)
        assert "disabled" in refused()
        opened.set_enabled(key, True)
        write_private(directory.sealed_root_path, json.dumps(document).encode())
        assert opens(directory)
        opened.destroy(key)
    assert "holds no version" in refused()


def test_another_vaults_root_key_is_not_sealed(directory: VaultDirectory, by: SealingKey) -> None:
    directory.root_key_path.write_bytes(bytes(32))
    with pytest.raises(VaultError, match="not the original root key"):
        seal_root(directory, by, new_key=True)
    assert directory.root_key_path.exists()
    assert not directory.sealed_root_path.exists()


def test_a_killed_command_leaves_a_root_key_and_is_repeated(
    directory: VaultDirectory, by: SealingKey, caplog: pytest.LogCaptureFixture
) -> None:
    plain, sealed = directory.root_key_path, directory.sealed_root_path
    root = plain.read_bytes()
    seal_root(directory, by, new_key=True)
    sealed_root = sealed.read_bytes()
    whole = {plain: root, sealed: sealed_root}

    def reset(old: Path) -> None:
        for path in directory.path.glob("*root.*"):  # temporary files too
            path.unlink()
        write_private(old, whole[old])

    modules = [root_key]
    for new, old in ((plain, sealed), (sealed, plain)):
        replace_root = partial(root_key._replace, new, whole[new], old)
        reset(old)
        left = []
        for point in faults.crash_points(modules, replace_root):
            reset(old)
            assert faults.dies_at(point, modules, replace_root)
            left.append({path for path in whole if path.exists()})
            assert left[-1]
            assert all(path.read_bytes() == whole[path] for path in left[-1])
        assert {old} in left
        assert {old, new} in left
    write_private(plain, root)
    assert read_root_key(directory, directory.settings()).material == root
    assert "in the clear" in caplog.text
    seal_root(directory)
    assert not plain.exists()


def test_an_instance_with_the_token_needs_the_sealed_key_only(
    directory: VaultDirectory, by: SealingKey, pair: str, tmp_path: Path
) -> None:
    root = directory.root_key_path.read_bytes()
    seal_root(directory, by, new_key=True)
    export_root(directory, tmp_path / "sealed", SECRET)
    export_root(directory, tmp_path / "clear", SECRET, unsealed=True)
    back_up(directory, tmp_path / "backup")
    elsewhere = replace(by, token={**by.token, "uri": "pkcs11:token=elsewhere"})
    with pytest.raises(VaultError, match="no token"):
        import_root(tmp_path / "sealed", tmp_path / "one", SECRET, sealed_by=elsewhere)
    with pytest.raises(VaultError, match="is sealed by key"):
        import_root(tmp_path / "sealed", tmp_path / "one", SECRET, sealed_by=replace(by, label=pair))
    one = import_root(tmp_path / "sealed", tmp_path / "one", SECRET)
    two = import_root(tmp_path / "clear", tmp_path / "two", SECRET, sealed_by=replace(by, label=pair))
    for made in (one, two):
        assert root not in content(made.path)
        restore(made, tmp_path / "backup")
        assert opens(made)
    assert import_root(tmp_path / "clear", tmp_path / "three", SECRET).root_key_path.read_bytes() == root


def test_instances_share_a_database_and_a_sealing_key(
    postgresql: PostgresqlServer, by: SealingKey, tmp_path: Path
) -> None:
    with postgresql.database(template="template0") as name, postgresql.database() as a_store:
        one = initialise(tmp_path / "one", database=postgresql.url(name), sealed_by=by, new_key=True)
        export_root(one, tmp_path / "sealed", SECRET)
        with pytest.raises(VaultError, match="belongs to another program"):
            import_root(tmp_path / "sealed", tmp_path / "two", SECRET, database=postgresql.url(a_store))
        two = import_root(tmp_path / "sealed", tmp_path / "two", SECRET)
        assert one.sealed_root_path.read_bytes() == two.sealed_root_path.read_bytes()
        with open_vault(one, Records()) as first, open_vault(two, Records()) as second:
            assert first.settings == second.settings
        seal_root(two, new_key=True)  # one at a time: the other instance has the old version
        assert opens(one)
        assert opens(two)


def test_commands_make_and_serve_a_vault_whose_root_key_was_never_on_the_disk(
    token: LabToken, tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOFTHSM2_CONF", str(token.options["softhsm-config"]))
    virt_sse, folder = CommandLine(root), tmp_path / "vault"
    uri = f"pkcs11:token={token.uri.token};object=made-by-init"
    options = ("--seal-uri", uri, "--seal-pin-file", token.folder.pin)
    made = virt_sse("vault", "init", "-d", folder, *options, "--new-seal-key")
    assert f"back up {folder / 'root.sealed'} and" in made
    assert not (folder / "root.key").exists()
    assert opens(VaultDirectory(folder))
    refused = virt_sse.refuses("vault", "init", "-d", tmp_path / "new", "--new-seal-key", status=2)
    assert "needs --seal-uri" in refused
    assert "need --seal-uri" in virt_sse.refuses(
        "vault", "seal-root", "-d", folder, "--seal-user", "root", status=2
    )
    virt_sse("vault", "seal-root", "-d", folder, "--new-seal-key")
    assert virt_sse("vault", "hsm", "unlock", "-d", folder) == "the token takes the PIN\n"
    virt_sse("vault", "unseal-root", "-d", folder)
    assert (folder / "root.key").stat().st_size == 32
    assert "not sealed yet" in virt_sse.refuses("vault", "seal-root", "-d", folder)


@pytest.mark.parametrize("uri", ["pkcs11:object=KEY", "pkcs11:token=T", "pkcs11:token=T;object=K;type=cert"])
def test_a_uri_names_token_and_key(uri: str) -> None:
    with pytest.raises(InvalidValueError, match="does not name a token and a key"):
        SealingKey.parse({"uri": uri})

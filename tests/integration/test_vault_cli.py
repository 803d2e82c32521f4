"""``virt-sse vault``, as an administrator types it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from support.command_line import PROGRAM, CommandLine
from virt_sse.lab.tokens import LabToken
from virt_sse.lab.vaults import LabVault


@pytest.fixture
def credential(lab_vault: LabVault, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The administrator's credential file, as the environment names it."""
    monkeypatch.setenv("VIRT_SSE_VAULT_CREDENTIAL", str(lab_vault.administrator_path))
    return lab_vault.administrator_path


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(root: Path, *arguments: str) -> Iterator[str]:
    """``virt-sse vault serve``, and what it says when it listens; it must end cleanly."""
    server = subprocess.Popen(
        [PROGRAM, "vault", "serve", *arguments],
        env={**os.environ, "VIRT_SSE_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline()
        finally:
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=20)
            assert server.returncode == 0
            assert said == ""


@pytest.mark.slow
def test_a_vault_is_made_and_served(root: Path, virt_sse: CommandLine) -> None:
    port = str(free_port())
    made = virt_sse("vault", "init", "--name", "ours", "--port", port)
    folder = root / "var/lib/virt-sse/vault"
    assert f"made vault https://localhost:{port} in {folder}" in made
    assert str(folder / "administrator.json") in made
    assert "already" in virt_sse.refuses("vault", "init")
    assert "does not answer" in virt_sse.refuses("vault", "status")
    with serving(root) as said:
        assert said == f"listening on https://127.0.0.1:{port}\n"
        status = json.loads(virt_sse("vault", "status", "-o", "json"))
        assert (status["name"], status["keys"], status["principals"]) == ("ours", 0, 1)
        assert "another process" in virt_sse.refuses("vault", "serve")
        assert "another process" in virt_sse.refuses("vault", "rescue", "b", "--file", root / "b.json")
    virt_sse("vault", "rescue", "second", "--file", root / "second.json")
    with serving(root, "--port", port):
        assert "second" in virt_sse("vault", "principal", "list", "-c", root / "second.json")


@pytest.mark.slow
def test_a_vault_that_cannot_be_served_is_refused_with_the_reason(
    root: Path, virt_sse: CommandLine, tmp_path: Path
) -> None:
    said = virt_sse.refuses("vault", "serve")
    assert "no vault in" in said
    assert "'virt-sse vault init'" in said
    port = free_port()
    virt_sse("vault", "init", "--port", str(port))
    with socket.create_server(("127.0.0.1", port)):
        assert "Address already in use" in virt_sse.refuses("vault", "serve")
        said = virt_sse.warns("vault", "init", "--directory", tmp_path / "other", "--port", str(port))
        assert f"another program listens on port {port} of this machine" in said
    assert "cannot listen on no such host" in virt_sse.refuses("vault", "serve", "--host", "no such host")
    root_key = root / "var/lib/virt-sse/vault/root.key"
    root_key.chmod(0o640)
    assert "is open to others" in virt_sse.refuses("vault", "serve")
    root_key.chmod(0o600)
    root_key.unlink()
    assert "lacks" in virt_sse.refuses("vault", "serve")


@pytest.mark.parametrize("options", [("--tier", "gold"), ("--host", "a b")])
def test_an_invalid_vault_is_refused(root: Path, virt_sse: CommandLine, options: tuple[str, str]) -> None:
    virt_sse.refuses("vault", "init", *options, status=2)
    assert not (root / "var/lib/virt-sse/vault").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("credential")
def test_principals_and_their_access_are_managed_from_the_command_line(
    virt_sse: CommandLine, tmp_path: Path
) -> None:
    file = tmp_path / "web.json"
    made = json.loads(
        virt_sse("vault", "principal", "create", "cli-web", "--file", file, "--days", "3", "-o", "json")
    )
    assert (made["name"], made["role"], made["enabled"], made["file"]) == ("cli-web", "none", True, str(file))
    assert file.stat().st_mode & 0o777 == 0o600
    listed = json.loads(virt_sse("vault", "access", "list", "-o", "json"))
    assert {"principal": "cli-web", "key": None, "permissions": []} in listed
    virt_sse("vault", "access", "set", "cli-web", "get", "wrapkey", "unwrapKey")
    rows = [line.split() for line in virt_sse("vault", "access", "list").splitlines()]
    assert ["cli-web", "-", "get,wrapKey,unwrapKey"] in rows
    left = json.loads(virt_sse("vault", "access", "remove", "cli-web", "get", "decrypt", "-o", "json"))
    assert left == {"principal": "cli-web", "key": None, "permissions": ["wrapKey", "unwrapKey"]}
    virt_sse("key", "create", "cli-only")
    virt_sse("vault", "access", "set", "cli-web", "encrypt", "--key", "CLI-only")
    rows = [line.split() for line in virt_sse("vault", "access", "list").splitlines()]
    assert ["cli-web", "cli-only", "encrypt"] in rows
    virt_sse("vault", "access", "remove", "cli-web", "--key", "cli-only")
    assert "cli-only" not in virt_sse("vault", "access", "list")
    virt_sse("vault", "access", "set", made["object-id"], "administer")
    assert "403 OperatorRequired" in virt_sse.refuses("vault", "principal", "list", "-c", file)
    virt_sse("vault", "principal", "disable", "cli-web")
    assert "gave no token (401" in virt_sse.refuses("vault", "status", "-c", file)
    virt_sse("vault", "principal", "enable", "cli-web")
    assert "lab-vault" in virt_sse("vault", "status", "-c", file)
    virt_sse("vault", "principal", "delete", "cli-web")
    assert "cli-web" not in virt_sse("vault", "principal", "list")


@pytest.mark.slow
@pytest.mark.usefixtures("credential")
def test_an_administrators_typing_errors_are_refused_with_the_reason(
    virt_sse: CommandLine, tmp_path: Path
) -> None:
    assert "choose from get, list" in virt_sse.refuses(
        "vault", "access", "set", "administrator", "wrap", status=2
    )
    assert "404" in virt_sse.refuses("vault", "principal", "delete", "no body")
    assert "last administrator" in virt_sse.refuses("vault", "principal", "delete", "administrator")
    virt_sse.refuses(
        "vault", "principal", "create", "a", "--file", tmp_path / "a", "--role", "king", status=2
    )
    assert not (tmp_path / "a").exists()
    assert "cannot read" in virt_sse.refuses("vault", "status", "-c", tmp_path / "none")


@pytest.mark.slow
def test_a_vault_is_made_with_its_own_hsm_token(virt_sse: CommandLine, tmp_path: Path) -> None:
    with LabVault(premium=True) as vault:
        arguments = ("--credential", vault.administrator_path)
        made = json.loads(virt_sse("key", "create", "web", "--protection", "hsm", *arguments, "-o", "json"))
        assert (made["type"], made["bits"]) == ("RSA-HSM", 3072)
        virt_sse("key", "create", "soft", *arguments)
        pem = tmp_path / "key.pem"
        private = rsa.generate_private_key(65537, 2048)
        pem.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        virt_sse("key", "import", "mine", pem, "--protection", "hsm", *arguments)
        virt_sse.refuses("key", "create", "x", "--protection", "steel", *arguments, status=2)
        rows = [line.split()[:2] for line in virt_sse("key", "list", *arguments).splitlines()[1:]]
        assert rows == [["mine", "RSA-HSM"], ["soft", "RSA"], ["web", "RSA-HSM"]]

        pin = (vault.directory / "hsm/pin").read_bytes().strip()
        for name in ("cmdline", "environ"):
            assert pin not in Path(f"/proc/{vault.pid}/{name}").read_bytes()
        assert {path.stat().st_mode & 0o077 for path in (vault.directory / "hsm").rglob("*")} == {0}

        (inside,) = (vault.directory / "hsm/tokens").iterdir()
        inside.rename(vault.directory / "hsm/hidden")
        assert "unavailable: " in virt_sse("vault", "status", *arguments)
        (vault.directory / "hsm/hidden").rename(inside)
        vault.stop()

        moved = shutil.copytree(vault.directory, tmp_path / "moved")
        program = (
            "import sys, pathlib\n"
            "from virt_sse.vault.home.layout import VaultDirectory\n"
            "from virt_sse.vault.vault import open_vault\n"
            "from virt_sse.audit.log import AuditLog\n"
            "path = pathlib.Path(sys.argv[1])\n"
            "with open_vault(VaultDirectory(path), AuditLog(path / 'audit.jsonl')) as vault:\n"
            "    sealed = vault.keys.encrypt('wrapKey', 'web', '', 'RSA-OAEP-256', b'dek')[1]\n"
            "    print(vault.keys.decrypt('unwrapKey', 'web', '', 'RSA-OAEP-256', sealed)[1])\n"
        )
        done = subprocess.run([sys.executable, "-c", program, moved], capture_output=True, text=True)
        assert done.stdout == "b'dek'\n", done.stderr


@pytest.mark.slow
def test_a_vault_is_given_an_existing_hsm_token(
    root: Path, virt_sse: CommandLine, lab_token: LabToken
) -> None:
    uri = ("--hsm-uri", str(lab_token.uri))
    assert "standard vault has no HSM" in virt_sse.refuses("vault", "init", *uri, status=2)
    assert "need --hsm-uri" in virt_sse.refuses(
        "vault", "init", "--tier", "premium", "--hsm-pin-file", lab_token.folder.pin, status=2
    )
    said = virt_sse.refuses("vault", "init", "--tier", "premium", "--hsm-uri", "pkcs11:token=x;pin-value=77")
    assert "may not hold a PIN" in said
    assert "77" not in said
    assert not (root / "var/lib/virt-sse/vault/vault.json").exists()
    virt_sse("vault", "init")
    assert "vault hsm add" in virt_sse.refuses("vault", "hsm", "unlock")
    # SoftHSM's configuration comes from the environment, as for all who use it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(lab_token.folder.path.parent / "softhsm2.conf"))
        options = (*uri, "--hsm-module", "softhsm2", "--hsm-pin-file", lab_token.folder.pin)
        assert f"serial={lab_token.uri.serial}" in virt_sse("vault", "hsm", "add", *options)
        assert "has an HSM already" in virt_sse.refuses("vault", "hsm", "add", *options)
        assert virt_sse("vault", "hsm", "unlock") == "the token takes the PIN\n"

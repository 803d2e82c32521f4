"""``virt-sse host doctor``: faults of keys, programs, certificates, file systems, units and logs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from support import images
from support.command_line import CommandLine
from support.folders import REPOSITORY

pytestmark = pytest.mark.slow

_MEMORY = Path("/dev/shm")  # noqa: S108 -- a private folder below


@pytest.fixture
def cli(tmp_path: Path) -> CommandLine:
    cli = CommandLine(tmp_path)
    cli("host", "init")
    return cli


def ids(cli: CommandLine, status: int) -> list[str]:
    found = json.loads(cli("host", "doctor", "-o", "json", status=status))
    assert all(each["problem"] and each["remedy"] for each in found)
    assert status == (1 if any(each["severity"] == "error" for each in found) else 3 if found else 0)
    return [each["id"] for each in found]


def test_keys_that_are_gone_or_open_to_others(cli: CommandLine, tmp_path: Path) -> None:
    key = tmp_path / "var/lib/virt-sse/host.key"
    key.chmod(0o644)
    assert ids(cli, 1) == ["host-key-unusable"]
    key.unlink()
    keyring = next(path.parent for path in tmp_path.rglob("root.key"))
    shutil.rmtree(keyring)
    assert ids(cli, 1) == ["keyring-unusable", "host-key-unusable"]
    cli("host", "init")
    assert ids(cli, 0) == []


def test_a_clock_behind_the_records(cli: CommandLine, tmp_path: Path) -> None:
    ahead = time.time() + 3600
    os.utime(tmp_path / "var/lib/virt-sse/store.sqlite", (ahead, ahead))
    assert ids(cli, 1) == ["clock-behind"]


def test_a_store_of_a_newer_version(cli: CommandLine, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "var/lib/virt-sse/store.sqlite") as store:
        store.execute("UPDATE alembic_version SET version_num = '9999'")
    store.close()
    assert ids(cli, 1) == ["store-unreadable"]


@pytest.mark.parametrize(
    ("days", "status", "found"),
    [(90, 0, []), (10, 3, ["certificate-expires"]), (-1, 1, ["certificate-expired"])],
)
def test_a_certificate_about_to_expire(
    cli: CommandLine, tmp_path: Path, days: int, status: int, found: list[str]
) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_bytes(certificate(timedelta(days=days)))
    config = tmp_path / "etc/virt-sse/config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f'[key-providers.vault-transit]\nca = "{authority}"\n')
    assert ids(cli, status) == found


def certificate(lifetime: timedelta) -> bytes:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vault")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(days=99)).not_valid_after(now + lifetime)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_a_credential_that_has_expired(cli: CommandLine, tmp_path: Path) -> None:
    folder = tmp_path / "var/lib/virt-sse/identities"
    folder.mkdir(mode=0o700, exist_ok=True)
    (folder / "web.json").write_text(json.dumps({"expires": 1_600_000_000, "ca_certificate": ""}))
    assert ids(cli, 1) == ["credential-expired"]


def test_a_missing_tool_and_a_cipher_that_qemu_lacks(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup", "bwrap")
    cli("disk", "create", "web", "--size", "1M", "--path", tmp_path / "web.qcow2")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("qemu-img", "cryptsetup", "bwrap", "sh"):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    monkeypatch.setenv("PATH", str(tools))
    assert ids(cli, 1) == ["tool-missing", "cipher-missing"]


def test_units_that_are_missing_or_not_enabled(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    assert ids(cli, 3) == ["unit-missing"]
    units = tmp_path / "etc/systemd/system"
    cli("agent", "units", units)
    assert ids(cli, 3) == ["unit-not-enabled", "unit-not-enabled"]
    for name, target in (("socket", "sockets"), ("service", "multi-user")):
        wants = units / f"{target}.target.wants"
        wants.mkdir()
        (wants / f"virt-sse-agent.{name}").symlink_to(units / f"virt-sse-agent.{name}")
    assert ids(cli, 0) == []


def test_denials_in_the_logs_and_a_missing_rule(cli: CommandLine, tmp_path: Path) -> None:
    abstraction = tmp_path / "etc/apparmor.d/abstractions/libvirt-qemu"
    abstraction.parent.mkdir(parents=True)
    abstraction.touch()
    log = tmp_path / "var/log/kern.log"
    log.parent.mkdir(exist_ok=True)
    other = 'kernel: audit: apparmor="DENIED" operation="open" profile="cupsd" name="/etc/x"\n'
    log.write_text(other)
    assert ids(cli, 1) == ["apparmor-rule-missing"]
    cli("host", "init")
    assert ids(cli, 0) == []
    log.write_text(
        f'{other}kernel: audit: apparmor="DENIED" operation="connect" profile="libvirt-5e5e1ab0"'
        ' name="/run/virt-sse-disks/d0d0/guest/nbd" comm="qemu-system-x86" requested_mask="wr"\n'
    )
    assert ids(cli, 3) == ["access-denied"]


def test_user_ids_of_storage_processes_that_belong_to_accounts(cli: CommandLine, tmp_path: Path) -> None:
    config = tmp_path / "etc/virt-sse/config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('[host]\nstorage-uids = "65000-65600"\n')  # nobody
    assert "uids-taken" in ids(cli, 1)


@pytest.fixture
def memory() -> Iterator[Path]:
    if not _MEMORY.is_mount():
        pytest.skip(f"needs a tmpfs at {_MEMORY}")
    with tempfile.TemporaryDirectory(dir=_MEMORY) as name:
        yield Path(name)


def test_images_that_end_with_the_machine(cli: CommandLine, memory: Path) -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    cli("disk", "create", "web", "--size", "1M", "--path", memory / "web.qcow2")
    assert ids(cli, 3) == ["file-system-unsuitable"]


def test_a_socket_that_an_agent_left_behind(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run/virt-sse"
    folder.mkdir(mode=0o700, exist_ok=True, parents=True)
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind("agent.sock")
    assert ids(cli, 3) == ["agent-socket-stale"]


def test_every_fault_is_documented() -> None:
    named = set()
    for path in (REPOSITORY / "backend/virt_sse/host").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("HostFault", "_noting"):
                named |= {
                    each.value
                    for each in node.args[:2]
                    if isinstance(each, ast.Constant) and "-" in str(each.value)
                }
    documented = set(
        re.findall(r"`([a-z]+(?:-[a-z]+)+)`", (REPOSITORY / "backend/docs/reference/doctor.md").read_text())
    )
    assert len(named) > 20
    assert named - {"host-key"} <= documented
    assert documented - named == {
        f"{what}-{end}" for what in ("certificate", "credential") for end in ("expired", "expires")
    }


def test_the_doctor_changes_nothing(cli: CommandLine, tmp_path: Path) -> None:
    def state() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    before = state()
    assert ids(cli, 0) == []
    assert state() == before

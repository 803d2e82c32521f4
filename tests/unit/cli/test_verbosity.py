"""``--quiet``, ``--verbose`` and ``--debug``: more or less is said, and never a secret."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support import images
from support.canaries import Canaries
from support.command_line import no_libvirt
from support.loaded_commands import run_command
from virt_sse.backend import Backend
from virt_sse.cli.tracebacks import print_traceback
from virt_sse.errors import StoreError
from virt_sse.model.disks import NewDisk


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "cryptsetup")


def run(root: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)}
    return run_command(arguments, os.environ | environment)


def test_quiet_prints_the_requested_data_and_errors_only(root: Path, backend: Backend) -> None:
    backend.disks.create(NewDisk(name="web", size=1 << 20))
    done = run(root, "--quiet", "disk", "check", "web")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run(root, "disk", "list", "-q").stdout == run(root, "disk", "list").stdout
    assert run(root, "-q", "disk", "show", "x").stderr.startswith("virt-sse: error: no disk 'x'\n")


def test_verbose_names_the_tools_and_their_time(root: Path, backend: Backend) -> None:
    backend.disks.create(NewDisk(name="web", size=1 << 20))
    done = run(root, "disk", "check", "web", "--verbose")
    assert "qemu-img ran for 0." in done.stderr
    assert "key-secret" not in done.stderr


def test_debug_shows_arguments_and_tracebacks_and_no_secret(
    root: Path, backend: Backend, tmp_path: Path
) -> None:
    said = run(root, "disk", "create", "web", "--size", "4M", "--debug").stderr
    disk = backend.disks.get("web")
    canaries = Canaries()
    for entry in disk.deks:
        dek = backend.host.keys.unwrap_slot(disk, entry.slot)
        canaries.add(f"DEK {entry.slot}", dek.material)
        canaries.add(f"passphrase {entry.slot}", dek.passphrase)
    for file in (root / "var/lib/virt-sse/platform-managed").rglob("*"):
        if file.is_file() and len(content := file.read_bytes()) == 32:
            canaries.add(file.name, content)
    plain = tmp_path / "plain.raw"
    for arguments in (
        ("disk", "check", "web"),
        ("disk", "resize", "web", "8M"),
        ("disk", "export", "web", plain, "--plaintext", "--format", "raw"),
        ("disk", "import", "again", plain, "--source-format", "raw"),
        ("disk", "list"),
        ("key", "rotate", "--provider", "platform-managed"),
        ("disk", "xml", "web"),
    ):
        done = run(root, "--debug", *arguments)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    failed = run(root, "--debug", "disk", "import", "web", plain)
    assert "Traceback (most recent call last)" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("virt-sse: ")
    said += failed.stderr
    assert "run: qemu-img convert" in said
    assert "run: cryptsetup luksFormat" in said
    assert len(canaries.names()) >= 2
    assert canaries.within(said.encode()) == set()


def test_a_databases_password_is_in_no_traceback(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    password = "canary-of-the-database"  # noqa: S105 -- a test's
    config = root / "etc/virt-sse/config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f'[store]\nurl = "postgresql+psycopg://u:{password}@127.0.0.1:1/store"\n')
    config.chmod(0o600)
    done = run(root, "disk", "list", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert password not in done.stderr
    try:
        raise ValueError(f"invalid URL postgresql://u:{password}@host/store")
    except ValueError as exc:
        error = StoreError("cannot open the store")
        error.__cause__ = exc
    print_traceback(error)
    assert "postgresql://u:***@host/store" in capsys.readouterr().err

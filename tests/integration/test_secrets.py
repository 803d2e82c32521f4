"""A DEK lies nowhere in the clear: no argument, environment, output, log, error or file."""

from __future__ import annotations

import base64
import logging
import os
import subprocess
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import cast
from unittest.mock import Mock

import pytest

from support import images
from support.command_line import PROGRAM, no_libvirt
from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.secret_watch import SecretWatch
from virt_sse.backend import Backend
from virt_sse.domains.start import DomainStart
from virt_sse.errors import VirtSseError
from virt_sse.host.setup import initialise
from virt_sse.lab.host import LabHost
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import drop_secret, set_secret
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, NewDisk
from virt_sse.model.keys import Dek
from virt_sse.qemu import img
from virt_sse.qemu.formatting import Volume, make

M = 1 << 20


def spellings(passphrase: bytes) -> list[bytes]:
    """A DEK as it could show: raw, base64, hexadecimal, and as Python writes bytes."""
    material = base64.b64decode(passphrase)
    return [material, passphrase.rstrip(b"="), material.hex().encode(), repr(material)[2:-1].encode()]


def below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_secret_set_again_while_unused_is_not_dropped(lab_host: LabHost) -> None:
    """A hook without the agent serves a domain that starts while the agent is about to drop its secrets."""
    name = SecretName(uuid.uuid4(), "service")
    before_the_start = InventorySnapshot(1, secrets=frozenset({name.usage}))
    watch = SecretWatch(lab_host.uri, cast(DomainStart, Mock()), Metrics(), unused_seconds=60)
    watch._unused[name.usage] = time.monotonic() - 61
    with closing(lab_host.connect()) as connection:
        set_secret(connection, name, Dek.generate())
        watch.keep(before_the_start, lambda _domain: False)
        watch._pool.shutdown()
        assert connection.secretLookupByUUID(name.uuid.bytes).usageID() == name.usage
        assert drop_secret(connection, name, spared_seconds=1e-9)
        assert not drop_secret(connection, name)


@pytest.mark.slow
def test_no_process_has_a_secret_in_its_arguments_or_environment(root: Path, tmp_path: Path) -> None:
    images.require("strace", "qemu-img", "qemu-io", "cryptsetup")
    (tmp_path / "source").write_bytes(os.urandom(M))
    with Backend.open(root) as backend:
        initialise(backend.host)
    environment = {**os.environ, "LIBVIRT_DEFAULT_URI": no_libvirt(root)}
    said = b""
    for number, arguments in enumerate(
        (
            ["create", "disk", "-s", "1M"],
            ["import", "imported", tmp_path / "source", "--source-format", "raw", "--format", "raw"],
            ["check", "disk"],
            ["resize", "imported", "2M"],
            ["export", "imported", tmp_path / "out", "--plaintext"],
            ["show", "disk", "-o", "json"],
        )
    ):
        trace = ["strace", "-f", "-qq", "-v", "-xx", "-s", "100000", "-e", "trace=execve"]
        done = subprocess.run(
            [*trace, "-o", tmp_path / f"trace-{number}", PROGRAM, "disk", *arguments],
            env=environment,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    traces = [path.read_text() for path in sorted(tmp_path.glob("trace-*"))]
    tools = (
        "".join(f"\\x{byte:02x}" for byte in b"qemu-img"),
        "".join(f"\\x{byte:02x}" for byte in b"cryptsetup"),
    )
    assert all(tool in "".join(traces) for tool in tools)
    with Backend.open(root) as backend:
        for disk in backend.disks.all():
            for spelling in spellings(images.passphrase(backend, disk)):
                escaped = "".join(f"\\x{byte:02x}" for byte in spelling)
                assert not any(escaped in trace for trace in traces)
                assert spelling not in said
                assert not images.contains(below(root), spelling)


def test_no_store_log_or_image_holds_a_secret(backend: Backend, root: Path) -> None:
    keys = []
    for name in images.FORMATS:
        disk = backend.disks.create(NewDisk(name=name, size=M, format=DiskFormat(name)))
        keys += spellings(images.passphrase(backend, disk))
    backend.keys.rotate(PLATFORM_KEY)
    files = below(root)  # while the store is open, its write-ahead log is one of them
    assert any(path.name.endswith("-wal") for path in files)
    assert not images.contains(files, *keys)


def test_no_error_and_no_log_line_shows_a_secret(
    backend: Backend, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    disk = backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat.RAW))
    keys = [spelling.decode("latin-1") for spelling in spellings(images.passphrase(backend, disk))]
    dek = Dek(base64.b64decode(images.passphrase(backend, disk)))
    disk.path.write_bytes(disk.path.read_bytes()[:4096] + bytes(3 * M))

    def shown(exc: BaseException | None) -> str:
        return "" if exc is None else f"{exc} {exc!r} {vars(exc)} " + shown(exc.__cause__ or exc.__context__)

    attempts = (
        lambda: backend.disks.check("disk"),
        lambda: backend.disks.resize("disk", 2 * M),
        lambda: backend.transfer.export("disk", tmp_path / "out"),
        lambda: make(tmp_path / "image", DiskFormat.QCOW2, 1 << 62, [Volume(disk.deks[0].cipher, dek)]),
        lambda: img.check(tmp_path / "image", DiskFormat.QCOW2, [dek]),
    )
    for attempt in attempts:
        with pytest.raises(VirtSseError) as caught:
            attempt()
        assert not [key for key in keys if key in shown(caught.value)]
    assert not [key for key in keys if key in caplog.text + repr(disk) + repr(dek) + str(disk.envelope)]

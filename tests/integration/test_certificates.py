"""Certificates of deletions, as an operator gets and verifies them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from support.lab_operator import Operator
from virt_sse.backend import Backend
from virt_sse.disks import erasure
from virt_sse.errors import CertificateError, HostKeyError, ImageError
from virt_sse.model.certificate import DeletionCertificate
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk

M = 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


def create(backend: Backend, name: str = "disk") -> Disk:
    return backend.disks.create(NewDisk(name=name, size=M))


def verified(backend: Backend, name: str) -> DeletionCertificate:
    certificate = backend.certificates.get(name)
    certificate.verify(backend.certificates.key.load().public_key())
    return certificate


def test_a_certificate_names_what_was_destroyed_all_keys_and_all_copies(backend: Backend) -> None:
    disk = create(backend)
    before = disk.deks[0].wrapped.key
    key, _ = backend.keys.rotate(PLATFORM_KEY)
    for source, copy in (("disk", "one"), ("one", "two"), ("two", "three")):
        backend.copies.copy([NewDisk(name=copy, source=backend.disks.get(source))])
    backend.disks.erase(backend.disks.get("one"), certified=True)
    assert [each.name for each in verified(backend, "one").statement.remaining] == ["disk", "three", "two"]
    backend.disks.erase(disk, certified=True)
    statement = verified(backend, "disk").statement
    assert (statement.disk.id, statement.disk.path, statement.disk.size) == (disk.id, str(disk.path), M)
    assert statement.image == "erased"
    (dek,) = statement.deks
    assert (dek.slot, dek.cipher) == ("service", "aes-256-xts")
    assert dek.keys == (str(before), str(key))
    assert [(each.kind, each.name) for each in statement.remaining] == [("disk", "three"), ("disk", "two")]
    backend.disks.erase(backend.disks.get("two"))
    with pytest.raises(CertificateError, match="no deletion certificate"):
        backend.certificates.get("two")


def test_a_missing_image_is_not_certified_as_erased(backend: Backend) -> None:
    disk = create(backend)
    disk.path.unlink()
    backend.disks.erase(disk, certified=True)
    assert verified(backend, str(disk.id)).statement.image == "missing"


def test_a_refused_deletion_has_no_certificate(backend: Backend) -> None:
    disk = create(backend)
    backend.disks.erase(disk, certified=True, dry_run=True)
    key = backend.certificates.key.path
    key.write_bytes(b"short")
    key.chmod(0o600)
    with pytest.raises(HostKeyError, match="no signing key"):
        backend.disks.erase(disk, certified=True)
    backend.disks.check("disk")
    with pytest.raises(CertificateError):
        backend.certificates.get("disk")


def test_the_signing_key_is_private_and_lasts(backend: Backend) -> None:
    key = backend.certificates.key
    first = key.provision()
    assert images.mode(key.path) == 0o600
    assert key.provision().private_bytes_raw() == first.private_bytes_raw()
    key.path.chmod(0o640)
    with pytest.raises(HostKeyError, match="open to other users"):
        key.load()


def test_the_command_writes_a_certificate_and_another_host_verifies_it(
    backend: Backend, virt_sse: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(backend)
    file = tmp_path / "certificate.json"
    file.write_text("precious")
    assert "exists already" in virt_sse.refuses("disk", "delete", "disk", "--purge", "--certificate", file)
    file.unlink()
    # Without libvirt, the command refuses to delete: the rest is done in this process.
    monkeypatch.setattr(backend.hotplug, "users", lambda _disk: [])
    backend.disks.delete("disk", certified=True)
    file.write_text(virt_sse("certificate", "show", "disk"))
    public = virt_sse("certificate", "public-key").strip()
    (listed,) = json.loads(virt_sse("certificate", "list", "-o", "json"))
    assert listed["name"] == "disk"
    backend.certificates.key.path.unlink()
    assert "cannot read the signing key" in virt_sse.refuses("certificate", "verify", file)
    found = json.loads(virt_sse("certificate", "verify", file, "--public-key", public, "-o", "json"))
    assert (found["signature"], found["disk-name"], found["image"]) == ("valid", "disk", "erased")
    file.write_text(file.read_text().replace('"erased"', '"missing"'))
    refused = virt_sse.refuses("certificate", "verify", file, "--public-key", public)
    assert "was altered" in refused


def test_an_error_after_the_erasure_leaves_the_certificate_to_the_next_command(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = create(backend)
    with monkeypatch.context() as patch:
        patch.setattr(erasure, "sync_folder", lambda _folder: os.close(-1))
        with pytest.raises(ImageError, match="Bad file descriptor"):
            backend.disks.erase(disk, certified=True)
    with pytest.raises(CertificateError):
        backend.certificates.get("disk")
    backend.disks.recover()
    assert verified(backend, "disk").statement.image == "erased"


@pytest.mark.slow
def test_the_command_deletes_and_writes_the_certificate(
    operator: Operator, name: str, tmp_path: Path
) -> None:
    operator.create(name, "--size", "1M")
    file = tmp_path / "certificate.json"
    operator.virt_sse("disk", "delete", name, "--purge", "--certificate", file, "--dry-run")
    assert not file.exists()
    assert "cannot make a file" in operator.virt_sse(
        "disk", "delete", name, "--purge", "--certificate", tmp_path / "none/x", status=1
    )
    operator.virt_sse("disk", "delete", name)
    operator.virt_sse("disk", "purge", name, "--certificate", file)
    assert images.mode(file) == 0o600
    found = json.loads(operator.virt_sse("certificate", "verify", file, "-o", "json"))
    assert (found["disk-name"], found["image"], found["remaining"]) == (name, "erased", [])

"""A migration to this host is told from a start by a token that holds once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.waiting import wait_until
from virt_sse.config import Config
from virt_sse.domains.incoming import IncomingDomains, has_open_for_writing, refuse_data_on_host
from virt_sse.errors import DiskInUseError, PolicyError, VmStateError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import temp_disk_id
from virt_sse.system.running_process import qemu_process

VM = uuid.UUID("0b2d2d1c-9d3c-4a83-9d0c-7a1d5a3f8f10")


def definition(devices: str = "") -> DomainDefinition:
    return DomainDefinition.parse(
        f"<domain type='qemu'><name>web</name><uuid>{VM}</uuid>"
        f"<metadata><x:y xmlns:x='https://example.com/'/></metadata><devices>{devices}</devices></domain>"
    )


@pytest.fixture
def incoming(root: Path) -> IncomingDomains:
    return IncomingDomains(Config.load(root))


def test_a_token_is_of_one_migration(incoming: IncomingDomains) -> None:
    assert not incoming.claim(definition())
    first = DomainDefinition.parse(incoming.announce(definition()))
    assert "https://example.com/" in first.to_xml()
    assert not incoming.claim(definition())  # a start of the domain as defined
    second = DomainDefinition.parse(incoming.announce(first))
    assert second.to_xml().count("token=") == 1
    assert not incoming.claim(first)
    assert incoming.claim(second)
    assert not incoming.claim(second)


def test_a_migration_ends_with_the_domain(incoming: IncomingDomains) -> None:
    announced = DomainDefinition.parse(incoming.announce(definition()))
    assert incoming.forget(VM)
    assert not incoming.forget(VM)
    assert not incoming.claim(announced)


def test_a_token_is_valid_for_a_minute(incoming: IncomingDomains, root: Path) -> None:
    announced = DomainDefinition.parse(incoming.announce(definition()))
    noted = Config.load(root).incoming_directory / str(VM)
    os.utime(noted, (0, 0))
    assert not incoming.claim(announced)


def test_qemu_is_checked_in_a_migration_only(incoming: IncomingDomains) -> None:
    announced = DomainDefinition.parse(incoming.announce(definition()))
    incoming.check_started(announced)  # not prepared
    assert incoming.claim(announced)
    with pytest.raises(VmStateError, match="cannot see the QEMU process"):
        incoming.check_started(announced)
    assert incoming.forget(VM)
    incoming.check_started(announced)  # restored from a saved state


def encrypted(image: Path, disk_id: uuid.UUID) -> str:
    """A disk of ours in the guest's QEMU."""
    return (
        f"<disk type='file'><source file='{image}'><encryption format='luks'><secret type='passphrase' "
        f"usage='{SecretName(disk_id, 'service').usage}'/></encryption></source><target dev='vda'/></disk>"
    )


@contextlib.contextmanager
def process_with_open(image: Path, mode: str, root: Path) -> Iterator[None]:
    """A process in the place of the domain's QEMU, with an image open."""
    pid_file = Config.load(root).qemu_pid_file("web")
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", "input()", str(VM)]
    image.touch()
    with image.open(mode) as file, subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file) as qemu:
        pid_file.write_text(str(qemu.pid))
        wait_until(lambda: qemu_process(pid_file, VM), "the process has its command line")
        try:
            yield
        finally:
            qemu.communicate(b"\n")


def test_a_qemu_that_writes_before_the_guest_comes_is_refused(
    incoming: IncomingDomains, root: Path, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    announced = DomainDefinition.parse(incoming.announce(definition(encrypted(image, uuid.uuid4()))))
    assert incoming.claim(announced)
    with (
        process_with_open(image, "r+b", root),
        pytest.raises(DiskInUseError, match="QEMU writes to the image of vda"),
    ):
        incoming.check_started(announced)


COPY, COPY_CHANGES, TLS = 1 << 6, 1 << 7, 1 << 16
"""libvirt's VIR_MIGRATE_NON_SHARED_DISK, VIR_MIGRATE_NON_SHARED_INC and VIR_MIGRATE_TLS."""


def test_a_disk_that_receives_content_needs_a_copy_by_tls(
    incoming: IncomingDomains, root: Path, tmp_path: Path
) -> None:
    image, disk_id, status = tmp_path / "image", uuid.uuid4(), Config.load(root).domain_status_file("web")
    announced = DomainDefinition.parse(incoming.announce(definition(encrypted(image, disk_id)), [disk_id]))
    assert incoming.claim(announced)

    def check(flags: int, checks: IncomingDomains = incoming) -> None:
        job = f"<job type='none' async='migration in' phase='prepare' flags='{flags:#x}'/>"
        status.write_text(f"<domstatus state='paused' reason='migration'>{job}</domstatus>")
        checks.check_started(announced)

    with process_with_open(image, "r+b", root):
        with pytest.raises(VmStateError, match="cannot read"):
            incoming.check_started(announced)
        for flags in (TLS, TLS | COPY_CHANGES, TLS | COPY | COPY_CHANGES):
            with pytest.raises(PolicyError, match="does not copy them"):
                check(flags)
        with pytest.raises(PolicyError, match="in plaintext"):
            check(COPY)
        check(COPY | TLS)
        check(COPY, IncomingDomains(dataclasses.replace(Config.load(root), copies_without_tls=True)))
        status.write_text("<domstatus><job type='none' async='none'/></domstatus>")
        with pytest.raises(VmStateError, match="does not say how the domain migrates"):
            incoming.check_started(announced)
    with (
        process_with_open(image, "rb", root),
        pytest.raises(PolicyError, match="to which the migration copies nothing"),
    ):
        check(COPY | TLS)
    incoming.note_received(VM)
    note = incoming.forget(VM)
    assert note is not None
    assert note.received == frozenset()


def test_an_image_open_for_writing_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.touch()
    with path.open("rb"):
        assert not has_open_for_writing(os.getpid(), path)
    with path.open("r+b"):
        assert has_open_for_writing(os.getpid(), path)


def test_data_under_keys_of_the_vm_does_not_migrate() -> None:
    name = SecretName(temp_disk_id(VM), TEMP_SLOT)
    disk = (
        f"<disk type='file'><source file='/t'><encryption format='luks'><secret type='passphrase' "
        f"usage='{name.usage}'/></encryption></source><target dev='vdb'/></disk>"
    )
    tpm = (
        "<tpm><backend type='emulator'>"
        f"<encryption secret='{SecretName(VM, TPM_SLOT).uuid}'/></backend></tpm>"
    )
    with pytest.raises(PolicyError, match="has a temporary disk, which does not migrate"):
        refuse_data_on_host(definition(disk))
    with pytest.raises(PolicyError, match="has a TPM whose state is encrypted by virt-sse"):
        refuse_data_on_host(definition(tpm))
    refuse_data_on_host(definition("<tpm><backend type='emulator'/></tpm>"))

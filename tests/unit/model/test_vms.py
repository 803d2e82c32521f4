"""VMs in the store, in a domain's definition, and what of these must agree."""

from __future__ import annotations

import dataclasses
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from virt_sse.domains import tpm_envelope
from virt_sse.domains.host_encryption import agreed
from virt_sse.errors import EnvelopeError, InvalidValueError, PolicyError
from virt_sse.libvirt import domain_xml, vm_metadata
from virt_sse.libvirt.references import secret_uuid, usage
from virt_sse.libvirt.vm_metadata import Stated
from virt_sse.model.keys import KeyId, KeyRef, WrappedDek
from virt_sse.model.layers import HostCaching
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import PendingUpdate, Vm, VmProperties, check_size_name, temp_disk_id
from virt_sse.store import Store

ID = uuid.UUID("b6a1c5f2-3f4d-4a0b-9c57-0f0f5f0e7c11")
PLAIN = f"""\
<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web</name>
  <uuid>{ID}</uuid>
  <metadata>
    <app:info xmlns:app="http://example/app/1"><app:os id="debian"/></app:info>
  </metadata>
  <memory unit='MiB'>96</memory>
  <devices>
    <disk type='file'><driver name='qemu' type='raw'/><source file='/x'/><target dev='vda'/></disk>
    <tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>
  </devices>
  <qemu:commandline><qemu:arg value='-S'/></qemu:commandline>
</domain>
"""
ALL = VmProperties(encryption_at_host=True, size="Standard_D2s_v3", temp_disk_size=1 << 30)


def wrapped(version: str) -> WrappedDek:
    return WrappedDek(b"wrapped " + version.encode(), "A256KW", KeyId("platform-managed", "default", version))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/state/store.sqlite")
    yield store
    store.close()


def test_a_vm_comes_back_from_the_store_as_it_was(store: Store) -> None:
    disk = uuid.uuid4()
    vm = Vm(
        ID,
        "web",
        uuid.uuid4(),
        ALL,
        3,
        PendingUpdate(VmProperties(), {disk: HostCaching.READ_ONLY}),
        wrapped("1"),
    )
    assert store.vms.find(ID) is None
    store.vms.put(vm)
    assert store.vms.find(ID) == vm
    store.vms.put(bare := Vm(ID, "web", vm.host))
    assert store.vms.all() == [bare]
    store.vms.remove(ID)
    assert store.vms.all() == []


def test_a_commit_makes_pending_settings_current(store: Store) -> None:
    vm = Vm(ID, "web", uuid.uuid4(), VmProperties(), 3, PendingUpdate(ALL), wrapped("1"))
    store.vms.put(vm)
    after = store.vms.commit(vm)
    assert after == dataclasses.replace(vm, properties=ALL, generation=4, pending=None)
    assert store.vms.find(ID) == after
    assert store.vms.commit(after) == after


def test_the_key_of_a_tpm_is_in_use_and_rewrapped_by_compare_and_swap(store: Store) -> None:
    store.vms.put(Vm(ID, "web", uuid.uuid4(), tpm=wrapped("1")))
    store.vms.put(Vm(uuid.uuid4(), "other", uuid.uuid4()))
    assert store.vms.keys_in_use() == {wrapped("1").key: 1}
    assert [vm.id for vm in store.vms.under_key(KeyRef("platform-managed", "default"))] == [ID]
    assert store.vms.replace_tpm(ID, wrapped("1"), wrapped("2"))
    assert not store.vms.replace_tpm(ID, wrapped("1"), wrapped("3"))
    assert store.vms.keys_in_use() == {wrapped("2").key: 1}


def test_a_definition_carries_its_settings(tmp_path: Path) -> None:
    root = vm_metadata.parse(PLAIN)
    assert vm_metadata.stated(root) is None
    for said in (Stated(ALL, 7), Stated(VmProperties(), 8)):
        vm_metadata.state(root, said)
        text = ET.tostring(root, encoding="unicode")
        assert vm_metadata.stated(vm_metadata.parse(text)) == said
        assert vm_metadata.has_encryption_at_host(text) is said.properties.encryption_at_host
        assert text.count("<virt-sse:vm ") == 1
        assert "<app:os " in text, "what others have in the metadata stays, by its name"
        assert "<qemu:arg " in text


@pytest.mark.parametrize(
    "attributes",
    [
        "",
        "encryption-at-host='yes' generation='1'",
        "encryption-at-host='on'",
        "encryption-at-host='on' generation='x'",
        "encryption-at-host='on' generation='1' temp-disk-size='513'",
        "encryption-at-host='on' generation='1' size='a b'",
    ],
)
def test_invalid_metadata_is_refused(attributes: str) -> None:
    element = f"<v:vm xmlns:v='https://virt-sse.invalid/vm/1' {attributes}/>"
    with pytest.raises(InvalidValueError, match="makes no sense"):
        vm_metadata.stated(vm_metadata.parse(PLAIN.replace("<metadata>", f"<metadata>{element}")))
    whole = "<v:vm xmlns:v='https://virt-sse.invalid/vm/1' encryption-at-host='on' generation='1'/>"
    with pytest.raises(InvalidValueError, match="twice"):
        vm_metadata.stated(vm_metadata.parse(PLAIN.replace("<metadata>", f"<metadata>{whole}{whole}")))


def test_a_temporary_disk_is_found_in_a_definition() -> None:
    root = vm_metadata.parse(PLAIN)
    vm_metadata.set_temp_disk(root, ID, Path("/temp/disk.raw"))
    text = ET.tostring(root, encoding="unicode")
    assert domain_xml.our_disks(text) == [], "it is no disk in the store"
    (use,) = domain_xml.temp_disks(text)
    assert (use.disk_id, use.target, use.source) == (temp_disk_id(ID), "vdb", Path("/temp/disk.raw"))
    assert vm_metadata.secrets_of_vm(text) == [(temp_disk_id(ID), TEMP_SLOT)]

    moved = text.replace("vdb", "sdc").replace("<readonly", "<")
    root = vm_metadata.parse(moved)
    vm_metadata.set_temp_disk(root, ID, Path("/elsewhere/disk.raw"))
    (use,) = domain_xml.temp_disks(ET.tostring(root, encoding="unicode"))
    assert (use.target, use.source) == ("sdc", Path("/elsewhere/disk.raw")), (
        "its place stays as it was edited"
    )

    copy = uuid.uuid4()
    root = vm_metadata.parse(text.replace(str(ID), str(copy)))
    assert vm_metadata.secrets_of_vm(ET.tostring(root, encoding="unicode")) == [], (
        "another VM's stays that one's"
    )
    vm_metadata.set_temp_disk(root, copy, Path("/temp/copy.raw"))
    (use,) = domain_xml.temp_disks(ET.tostring(root, encoding="unicode"))
    assert use.disk_id == temp_disk_id(copy)
    vm_metadata.set_temp_disk(root, copy, None)
    assert domain_xml.temp_disks(ET.tostring(root, encoding="unicode")) == []


def test_a_tpm_is_found_in_a_definition() -> None:
    root = vm_metadata.parse(PLAIN)
    assert vm_metadata.tpm_secret(root) is None
    vm_metadata.set_tpm_encryption(root, ID, encrypted=True)
    vm_metadata.set_tpm_encryption(root, ID, encrypted=True)
    assert vm_metadata.tpm_secret(root) == secret_uuid(ID, TPM_SLOT)
    text = ET.tostring(root, encoding="unicode")
    assert text.count("<encryption") == 1
    assert vm_metadata.secrets_of_vm(text) == [(ID, TPM_SLOT)]
    assert vm_metadata.secrets_of_vm(text.replace(str(ID), str(uuid.uuid4()))) == []
    vm_metadata.set_tpm_encryption(root, ID, encrypted=False)
    assert vm_metadata.tpm_secret(root) is None
    assert usage(ID, TPM_SLOT) == f"virt-sse:{ID}:tpm"


def test_definition_and_store_must_agree() -> None:
    known, nobody = Vm(ID, "web", uuid.uuid4(), ALL), None
    assert agreed("web", known, Stated(ALL, 9)) == ALL
    assert agreed("web", nobody, Stated(ALL, 9)) == ALL
    assert agreed("web", nobody, None) == VmProperties()
    assert agreed("web", Vm(ID, "web", known.host), None) == VmProperties()
    for said, field in (
        (None, "encryption-at-host is off, the store says on"),
        (Stated(dataclasses.replace(ALL, size=None), 1), "size is none, the store says Standard_D2s_v3"),
        (
            Stated(dataclasses.replace(ALL, temp_disk_size=512), 1),
            "temp-disk-size is 512, the store says 1073741824",
        ),
    ):
        with pytest.raises(PolicyError, match=field):
            agreed("web", known, said)


def test_a_tpm_carries_its_wrapped_dek(tmp_path: Path) -> None:
    folder = tmp_path / "swtpm" / str(ID)
    assert tpm_envelope.read(folder, ID) is None
    tpm_envelope.write(folder, ID, wrapped("1"))
    tpm_envelope.write(folder, ID, wrapped("2"))
    assert tpm_envelope.read(folder, ID) == wrapped("2")
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(EnvelopeError, match="not that of the TPM"):
        tpm_envelope.read(folder, uuid.uuid4())
    file.write_bytes(b"nonsense")
    with pytest.raises(EnvelopeError):
        tpm_envelope.read(folder, ID)
    tpm_envelope.write(folder, ID, wrapped("2"))
    assert tpm_envelope.read(folder, ID) == wrapped("2")


def test_a_size_name_is_checked() -> None:
    assert check_size_name("Standard_E4-2s_v3") == "Standard_E4-2s_v3"
    for name in ("", "a b", "-x", "x" * 65, "é"):
        with pytest.raises(InvalidValueError):
            check_size_name(name)

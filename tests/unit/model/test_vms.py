"""VMs in the store, in a domain's definition, and what of these must agree."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.stores import execute
from virt_sse.domains import tpm_envelope
from virt_sse.domains.host_encryption import agreed_properties
from virt_sse.errors import EnvelopeError, InvalidValueError, PolicyError, StoreError
from virt_sse.libvirt.disk_element import Behind, DiskSource, disk_element
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domain_edit import DomainEdit
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.vm_metadata import Stated
from virt_sse.model.keys import KeyId, KeyRef, WrappedDek
from virt_sse.model.layers import HostCaching
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import PendingUpdate, Vm, VmProperties, check_size_name, temp_disk_id
from virt_sse.store.store import Store

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
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url)
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


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"caching": 1}', '{"encryption-at-host": 1}'])
def test_a_damaged_pending_update_is_a_store_error(store: Store, store_url: str, text: str) -> None:
    store.vms.put(Vm(ID, "web", uuid.uuid4()))
    execute(store_url, "UPDATE vms SET pending = :text", text=text)
    with pytest.raises(StoreError, match="pending update"):
        store.vms.find(ID)


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


def test_a_definition_carries_its_settings() -> None:
    definition = DomainDefinition.parse(PLAIN)
    assert definition.stated is None
    for said in (Stated(ALL, 7), Stated(VmProperties(), 8)):
        edit = DomainEdit(definition)
        edit.state(said)
        definition = edit.result()
        text = definition.to_xml()
        for each in (definition, DomainDefinition.parse(text)):
            assert each.stated == said
            assert each.has_encryption_at_host is said.properties.encryption_at_host
        assert text.count("<virt-sse:vm ") == 1
        assert "<app:os " in text, "what others have in the metadata stays, by its name"
        assert "<qemu:arg " in text
    assert DomainDefinition.parse(PLAIN).stated is None


def test_an_edit_leaves_its_original_alone() -> None:
    definition = DomainDefinition.parse(PLAIN)
    edit = DomainEdit(definition)
    assert edit.result() is definition
    edit.exclude_memory_from_core_dumps()
    first = edit.result()
    edit.set_tpm_encryption(encrypted=True)
    assert (definition.guest_data.dump_core, definition.to_xml()) == (None, PLAIN)
    assert (first.guest_data.dump_core, first.tpm_secret) == ("off", None)
    assert edit.result().tpm_secret is not None


def test_an_edit_writes_our_prefix_whatever_prefixes_the_original_has() -> None:
    prefixes = 'xmlns:virt-sse="https://virt-sse.invalid/vm/1" xmlns:v="https://virt-sse.invalid/vm/1"'
    edit = DomainEdit(DomainDefinition.parse(PLAIN.replace("<domain ", f"<domain {prefixes} ")))
    edit.state(Stated(ALL, 7))
    assert "<virt-sse:vm " in edit.result().to_xml()


def test_an_edit_sets_the_sources_of_disks() -> None:
    disk = uuid.uuid4()
    before = DiskSource(disk, "service", "raw", Path("/x"))
    element = disk_element(before, target="vdb")
    definition = DomainDefinition.parse(PLAIN.replace("<tpm ", f"{element}<tpm "))
    edit = DomainEdit(definition)
    edit.set_sources({uuid.uuid4(): before})
    assert edit.result() is definition
    after = dataclasses.replace(before, behind=Behind(Path("/run/nbd"), 30))
    edit.set_sources({disk: after})
    changed = edit.result()
    assert changed.our_disks == (after.use("vdb"),)
    assert DomainDefinition.parse(changed.to_xml()).our_disks == (after.use("vdb"),)
    again = DomainEdit(changed)
    again.set_sources({disk: after})
    assert again.result() is changed


def test_an_edit_changes_the_placement_of_a_disk_and_back() -> None:
    disk = uuid.uuid4()
    in_guest = DiskSource(disk, "service", "qcow2", Path("/x"))
    below = DiskSource(disk, None, "raw", Path("/x"), Behind(Path("/run/nbd"), 30), "stop")
    element = disk_element(in_guest, target="vdb")
    secret = element[element.index("<encryption") : element.index("</source>")]
    old = element.replace(secret, "").replace("</disk>", f"{secret}</disk>")
    for before in (element, old):
        definition = DomainDefinition.parse(PLAIN.replace("<tpm ", f"{before}<tpm "))
        edit = DomainEdit(definition)
        edit.set_sources({disk: below})
        changed = edit.result()
        assert changed.our_disks == (below.use("vdb"),)
        assert "<encryption" not in changed.to_xml()
        edit = DomainEdit(changed)
        edit.set_sources({disk: in_guest})
        assert edit.result().our_disks == (in_guest.use("vdb"),)


def test_an_edit_states_that_a_disk_has_no_backing_file_unless_an_overlay_has_the_disks_key() -> None:
    disk = uuid.uuid4()
    source = DiskSource(disk, "service", "qcow2", Path("/x"))
    element = disk_element(source, target="vdb").replace("  <backingStore />\n", "")
    assert "backingStore" not in element
    for path, is_stated in (("/x", True), ("/x.overlay", False)):
        definition = DomainDefinition.parse(PLAIN.replace("<tpm ", f"{element.replace('/x', path)}<tpm "))
        edit = DomainEdit(definition)
        edit.state_no_backing({disk: source})
        assert ("backingStore" in edit.result().to_xml()) is is_stated


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
    with pytest.raises(InvalidValueError, match="metadata is invalid"):
        _ = DomainDefinition.parse(PLAIN.replace("<metadata>", f"<metadata>{element}")).stated
    whole = "<v:vm xmlns:v='https://virt-sse.invalid/vm/1' encryption-at-host='on' generation='1'/>"
    with pytest.raises(InvalidValueError, match="two elements"):
        _ = DomainDefinition.parse(PLAIN.replace("<metadata>", f"<metadata>{whole}{whole}")).stated


def with_temp_disk(xml: str, path: Path | None) -> DomainDefinition:
    edit = DomainEdit(DomainDefinition.parse(xml))
    edit.set_temp_disk(path)
    return edit.result()


def test_a_temporary_disk_is_found_in_a_definition() -> None:
    definition = with_temp_disk(PLAIN, Path("/temp/disk.raw"))
    text = definition.to_xml()
    assert definition.our_disks == (), "it is no disk in the store"
    (use,) = definition.temp_disks
    assert (use.disk_id, use.target, use.source) == (temp_disk_id(ID), "vdb", Path("/temp/disk.raw"))
    assert definition.vm_secrets == (SecretName(temp_disk_id(ID), TEMP_SLOT),)

    moved = text.replace("vdb", "sdc").replace("<readonly", "<")
    (use,) = with_temp_disk(moved, Path("/elsewhere/disk.raw")).temp_disks
    assert (use.target, use.source) == ("sdc", Path("/elsewhere/disk.raw")), (
        "its place stays as it was edited"
    )

    copy = uuid.uuid4()
    copied = text.replace(str(ID), str(copy))
    assert DomainDefinition.parse(copied).vm_secrets == (), "another VM's stays that one's"
    definition = with_temp_disk(copied, Path("/temp/copy.raw"))
    (use,) = definition.temp_disks
    assert use.disk_id == temp_disk_id(copy)
    assert with_temp_disk(definition.to_xml(), None).temp_disks == ()


def with_tpm_encryption(definition: DomainDefinition, *, encrypted: bool) -> DomainDefinition:
    edit = DomainEdit(definition)
    edit.set_tpm_encryption(encrypted=encrypted)
    return edit.result()


def test_a_tpm_is_found_in_a_definition() -> None:
    definition = DomainDefinition.parse(PLAIN)
    assert definition.tpm_secret is None
    definition = with_tpm_encryption(definition, encrypted=True)
    definition = with_tpm_encryption(definition, encrypted=True)
    secret = SecretName(ID, TPM_SLOT)
    assert definition.tpm_secret == secret.uuid
    text = definition.to_xml()
    assert text.count("<encryption") == 1
    assert definition.vm_secrets == (secret,)
    assert DomainDefinition.parse(text.replace(str(ID), str(uuid.uuid4()))).vm_secrets == ()
    assert with_tpm_encryption(definition, encrypted=False).tpm_secret is None
    assert secret.usage == f"virt-sse:{ID}:tpm"


def test_definition_and_store_must_agree() -> None:
    known, nobody = Vm(ID, "web", uuid.uuid4(), ALL), None
    assert agreed_properties("web", known, Stated(ALL, 9)) == ALL
    assert agreed_properties("web", nobody, Stated(ALL, 9)) == ALL
    assert agreed_properties("web", nobody, None) == VmProperties()
    assert agreed_properties("web", Vm(ID, "web", known.host), None) == VmProperties()
    for said, field in (
        (None, "encryption-at-host is off, the store says on"),
        (Stated(dataclasses.replace(ALL, size=None), 1), "size is none, the store says Standard_D2s_v3"),
        (
            Stated(dataclasses.replace(ALL, temp_disk_size=512), 1),
            "temp-disk-size is 512, the store says 1073741824",
        ),
    ):
        with pytest.raises(PolicyError, match=field):
            agreed_properties("web", known, said)


def test_a_tpm_carries_its_wrapped_dek(tmp_path: Path) -> None:
    folder = tmp_path / "swtpm" / str(ID)
    assert tpm_envelope.read(folder, ID) is None
    tpm_envelope.write(folder, ID, wrapped("1"))
    tpm_envelope.write(folder, ID, wrapped("2"))
    assert tpm_envelope.read(folder, ID) == wrapped("2")
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(EnvelopeError, match="does not belong to the TPM"):
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

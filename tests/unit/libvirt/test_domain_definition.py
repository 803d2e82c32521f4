from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.disk_element import Behind, DiskSource, DomainDisk, disk_element
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.users import User
from virt_sse.libvirt.xml import parse_xml
from virt_sse.model.ceph import CephCluster
from virt_sse.model.cloud import DriverOptions
from virt_sse.model.slots import TEMP_SLOT, TPM_SLOT
from virt_sse.model.vms import temp_disk_id

GOLDEN = Path(__file__).parents[2] / "golden"
DISK = UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")


def source(path: str, driver_type: str = "raw", **other: Any) -> DiskSource:
    return DiskSource(disk_id=DISK, slot="service", driver_type=driver_type, path=Path(path), **other)


BEHIND = Behind(Path(f"/run/virt-sse-disks/{DISK}/guest/nbd"), 30)
CLUSTER = CephCluster((("10.0.0.1", 3300), ("fd00::2", 6789)), "virt-sse", Path("/etc/ceph/keyring"))
OPTIONS = DriverOptions("none", "native", 1, {"total_iops_sec": 500, "total_bytes_sec": 60_000_000})
ELEMENTS = {
    "disk-qcow2": disk_element(source("/var/lib/libvirt/images/db-01.qcow2", "qcow2"), target="vda"),
    "disk-raw-read-only-scsi": disk_element(
        source('/srv/a & b\'s "disk" <1>, ä.raw'), target="sdb", read_only=True
    ),
    "disk-with-an-iothread": disk_element(source("/srv/db.qcow2", "qcow2"), target="vdb", iothread=3),
    "disk-behind-a-socket": disk_element(
        source("/var/lib/libvirt/images/db-01.qcow2", "qcow2", behind=BEHIND, error_policy="stop"),
        target="vda",
    ),
    "disk-with-options": disk_element(
        source("/var/lib/libvirt/images/db-01.qcow2", "qcow2"), target="vda", options=OPTIONS
    ),
    "disk-with-options-behind-a-socket": disk_element(
        source("/var/lib/libvirt/images/db-01.qcow2", "qcow2", behind=BEHIND), target="vda", options=OPTIONS
    ),
    "disk-in-ceph": disk_element(
        source("rbd:vms/db-01", cluster=CLUSTER, error_policy="stop"), target="vda", options=OPTIONS
    ),
    "disk-decrypted-below": disk_element(
        DiskSource(DISK, None, "raw", Path("/var/lib/libvirt/images/db-01.qcow2"), BEHIND, "stop"),
        target="vda",
    ),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_disk_elements_are_those_of_the_golden_files(name: str, request: pytest.FixtureRequest) -> None:
    path = GOLDEN / f"{name}.xml"
    if request.config.getoption("--regenerate-golden"):
        path.write_text(ELEMENTS[name])
    assert ELEMENTS[name] == path.read_text()


@pytest.mark.parametrize("name", ELEMENTS)
def test_written_disk_elements_are_found_again(name: str) -> None:
    (use,) = our_disks(domain(ELEMENTS[name]))
    element = parse_xml(ELEMENTS[name], kind="disk element")
    place, target = element.find("source"), element.find("target")
    assert place is not None
    assert target is not None
    in_ceph = f"rbd:{place.get('name')}" if place.get("protocol") == "rbd" else None
    expected = place.get("file") or in_ceph or BEHIND.socket
    reconnects = place.find("reconnect") is not None
    read_only = element.find("readonly") is not None
    slot = "service" if place.find("encryption") is not None else None
    driver = element.find("driver")
    assert driver is not None
    iothread = driver.get("iothread")
    device = target.get("dev", "")
    assert use == DomainDisk(DISK, slot, Path(expected), device, reconnects, read_only, iothread)
    assert (use.secret is None) == (slot is None)
    assert DomainDefinition.parse(domain(ELEMENTS[name])).mentions_us


def our_disks(xml: str) -> list[DomainDisk]:
    return list(DomainDefinition.parse(xml).our_disks)


def domain(*disks: str) -> str:
    return f"<domain><name>d</name><devices><emulator/>{''.join(disks)}</devices></domain>"


def secret(slot: str = "service") -> str:
    usage = SecretName(DISK, slot).usage
    return f"<encryption format='luks'><secret type='passphrase' usage='{usage}'/></encryption>"


def test_a_domain_without_our_disks_has_no_reference() -> None:
    theirs = "<disk type='file'><source file='/x'><encryption format='luks'><secret type='passphrase' {}/>"
    theirs += "</encryption></source><target dev='vda'/></disk>"
    for reference in ("usage='other'", "uuid='6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1'"):
        assert our_disks(domain(theirs.format(reference))) == []
    assert our_disks(domain()) == []
    assert our_disks("<domain/>") == []
    assert our_disks(f"<domain><metadata>{ELEMENTS['disk-qcow2']}</metadata></domain>") == []


def test_our_secret_is_found_wherever_libvirt_puts_secrets() -> None:
    """Within the source or, as older domains have it, beside it; and in backing files and mirrors."""
    found = our_disks(
        domain(
            f"<disk><source file='/a'/>{secret('one')}<target dev='vda'/></disk>",
            f"<disk><source file='/b'>{secret('two')}</source><target dev='vdb'/>"
            f"<backingStore><source file='/c'>{secret('three')}</source>"
            f"<backingStore><source file='/d'>{secret('four')}</source></backingStore></backingStore>"
            f"<mirror><source file='/e'>{secret('five')}</source></mirror></disk>",
            f"<disk type='network'><source protocol='nbd'>{secret('six')}</source></disk>",
        )
    )
    assert [(use.slot, str(use.source), use.target) for use in found] == [
        ("one", "/a", "vda"),
        ("two", "/b", "vdb"),
        ("three", "/c", "vdb"),
        ("four", "/d", "vdb"),
        ("five", "/e", "vdb"),
        ("six", "None", ""),
    ]


@pytest.mark.parametrize("reference", ["virt-sse:", "virt-sse:nonsense:service", f"virt-sse:{DISK}"])
def test_an_invalid_secret_of_ours_is_refused(reference: str) -> None:
    disk = ELEMENTS["disk-qcow2"].replace(SecretName(DISK, "service").usage, reference)
    with pytest.raises(InvalidValueError, match="names an unknown secret"):
        our_disks(domain(disk))


@pytest.mark.parametrize("name", ["virt-sse:", "virt-sse:nonsense", f"virt-sse:{DISK}:service"])
def test_an_invalid_export_of_ours_is_refused_or_left_out(name: str) -> None:
    xml = domain(ELEMENTS["disk-decrypted-below"].replace(f"virt-sse:{DISK}", name))
    with pytest.raises(InvalidValueError, match="names an unknown NBD export"):
        our_disks(xml)
    salvaged = DomainDefinition.salvage(xml)
    assert (salvaged.our_disks, salvaged.unreadable) == ((), (name,))


def test_an_export_of_ours_is_found_wherever_the_disk_is_used() -> None:
    plain = f"<source protocol='nbd' name='virt-sse:{DISK}'><host transport='unix' socket='/s'/></source>"
    backing = f"<disk><source file='/b'/><backingStore>{plain}</backingStore><target dev='vdb'/></disk>"
    mirror = f"<disk><source file='/c'/><mirror>{plain}</mirror><target dev='vdc'/></disk>"
    others = [
        f"<disk><source protocol='rbd' name='virt-sse:{DISK}'/><target dev='vdd'/></disk>",
        f"<disk><source protocol='nbd' name='{DISK}'/><target dev='vde'/></disk>",
    ]
    found = our_disks(domain(backing, mirror, *others))
    assert [(use.slot, str(use.source), use.target) for use in found] == [
        (None, "/s", "vdb"),
        (None, "/s", "vdc"),
    ]
    identified = domain(backing, mirror).replace("<name>", f"<uuid>{DISK}</uuid><name>")
    assert DomainDefinition.parse(identified).secrets == frozenset()


def test_disks_of_a_damaged_definition_are_found_by_their_names() -> None:
    xml = domain(ELEMENTS["disk-qcow2"], ELEMENTS["disk-decrypted-below"]).removesuffix("</domain>")
    found = DomainDefinition.salvage(xml)
    assert [(use.disk_id, use.slot) for use in found.our_disks] == [(DISK, "service"), (DISK, None)]


@pytest.mark.parametrize(
    "text", ["", "<domain>", "no XML", "<a/><b/>", "\0", "<domainsnapshot/>", "<domain xmlns='x'/>"]
)
def test_a_document_that_is_not_domain_xml_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid domain XML"):
        DomainDefinition.parse(text)


@pytest.mark.parametrize("target", ["", "vd", "vdA", "vda1", "xvda", "vd a", "vdaaa", "vda\n", "x" * 1000])
def test_an_invalid_target_is_refused(target: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid target"):
        disk_element(source("/x"), target=target)


@pytest.mark.parametrize("target", ["sda", "hda"])
def test_only_virtio_disks_have_an_iothread(target: str) -> None:
    with pytest.raises(InvalidValueError, match="only virtio disks") as caught:
        disk_element(source("/x"), target=target, iothread=1)
    assert "<controller>" in str(caught.value.hint)


def test_the_bus_follows_the_target() -> None:
    for target, bus in (("vda", "virtio"), ("sdz", "scsi"), ("hdb", "ide"), ("vdaa", "virtio")):
        element = disk_element(source("/x"), target=target)
        assert f'dev="{target}" bus="{bus}"' in element


def test_the_first_free_target_is_chosen() -> None:
    def free_target(*names: str) -> str:
        disks = (f"<disk><target dev='{name}'/></disk>" for name in names)
        return DomainDefinition.parse(domain(*disks)).free_target()

    assert free_target() == "vda"
    assert free_target("vda", "vdc", "sdb") == "vdb"
    assert free_target(*(f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxy")) == "vdz"
    with pytest.raises(InvalidValueError, match="no free"):
        free_target(*(f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"))


ID = UUID("b6a1c5f2-3f4d-4a0b-9c57-0f0f5f0e7c11")


def test_a_definition_with_invalid_parts_still_has_valid_parts() -> None:
    """A broken part is an error for whoever reads the part, and for nobody else."""
    metadata = "<metadata><v:vm xmlns:v='https://virt-sse.invalid/vm/1'/></metadata>"
    tpm = "<tpm><backend type='emulator'><encryption secret='odd'/></backend></tpm>"
    odd = f"<disk><source file='/a'>{secret()}</source></disk>".replace(str(DISK), "zzz")
    definition = DomainDefinition.parse(
        f"<domain><name>d</name>{metadata}<devices>{odd}{tpm}</devices></domain>"
    )
    assert definition.name == "d"
    assert definition.free_target() == "vda"
    assert definition.has_emulated_tpm
    assert definition.mentions_us
    for part in (
        lambda: definition.uuid,
        lambda: definition.stated,
        lambda: definition.our_disks,
        lambda: definition.secrets,
        lambda: definition.tpm_secret,
        definition.disk_places,
        definition.disk_chains,
        definition.guest_data.disks,
    ):
        with pytest.raises(InvalidValueError):
            part()


@pytest.mark.parametrize("element", ["", "<uuid/>", "<uuid>nonsense</uuid>", "<uuid>1</uuid>"])
def test_a_domain_without_a_uuid_is_refused(element: str) -> None:
    definition = DomainDefinition.parse(f"<domain>{element}</domain>")
    with pytest.raises(InvalidValueError, match="no valid UUID"):
        _ = definition.uuid


@pytest.mark.parametrize("odd", ["virt-sse:zzz", "virt-sse:", f"virt-sse:{DISK}", "virt-sse:zzz:service"])
def test_what_is_malformed_is_left_out_of_a_salvaged_definition(odd: str) -> None:
    reference = f"<encryption format='luks'><secret type='passphrase' usage='{odd}'/></encryption>"
    tpm = "<tpm><backend type='emulator'><encryption secret='odd'/></backend></tpm>"
    disks = (
        f"<disk><source file='/a'>{secret()}</source>"
        f"<backingStore><source file='/b'>{reference}</source></backingStore><target dev='vda'/></disk>"
        f"<disk><source file='/c'>{reference}</source><target dev='vdb'/></disk>"
        f"<disk><source file='/d'>{secret('other')}</source><target dev='vdc'/></disk>"
    )
    xml = f"<domain><name>d</name><uuid>{ID}</uuid><devices>{disks}{tpm}</devices></domain>"
    with pytest.raises(InvalidValueError):
        _ = DomainDefinition.parse(xml).secrets
    found = DomainDefinition.salvage(xml)
    assert [(use.target, use.slot) for use in found.our_disks] == [("vda", "service"), ("vdc", "other")]
    assert {name.slot for name in found.secrets} == {"service", "other"}
    assert found.unreadable == (odd, odd, "the secret of the TPM")
    assert [chain.target for chain in found.disk_chains()] == ["vda", "vdb", "vdc"]
    assert all(link.is_encrypted for chain in found.disk_chains() for link in chain.links)
    assert found.to_xml() == xml


def test_of_a_text_beyond_the_limits_the_secrets_are_salvaged() -> None:
    odd = secret("odd").replace(str(DISK), "zzz")
    xml = f"<domain><name>a&amp;b</name><uuid>{ID}</uuid>{'<x>' * 100_000}{secret()}{odd}"
    with pytest.raises(InvalidValueError):
        DomainDefinition.parse(xml)
    found = DomainDefinition.salvage(xml)
    assert (found.name, found.uuid) == ("a&b", ID)
    assert [name.usage for name in found.secrets] == [SecretName(DISK, "service").usage]
    assert len(found.unreadable) == 2
    for text in ("", "\0", "\ud800", "<a/>", "<!DOCTYPE a><domain/>", "<uuid></uuid>"):
        assert DomainDefinition.salvage(text).our_disks == ()


def test_a_salvaged_definition_of_a_sound_domain_is_the_parsed_one() -> None:
    xml = domain(*ELEMENTS.values())
    found = DomainDefinition.salvage(xml)
    assert found.our_disks == DomainDefinition.parse(xml).our_disks
    assert found.unreadable == ()


def test_an_odd_secret_among_ours_is_an_error_and_among_others_is_none() -> None:
    ours = f"<disk><source file='/a'>{secret()}</source></disk>"
    for odd, is_odd in (("virt-sse:zzz", True), ("virt-sse", False), ("zzz", False)):
        encryption = f"<encryption><secret type='passphrase' usage='{odd}'/></encryption>"
        definition = DomainDefinition.parse(
            domain(ours, f"<disk><source file='/b'>{encryption}</source></disk>")
        )
        if is_odd:
            with pytest.raises(InvalidValueError, match="names an unknown secret"):
                _ = definition.our_disks
        else:
            assert [use.disk_id for use in definition.our_disks] == [DISK]


def test_all_secrets_of_a_domain_are_named() -> None:
    own = SecretName(temp_disk_id(ID), TEMP_SLOT)
    tpm = SecretName(ID, TPM_SLOT)
    temp = f"<disk><source file='/t'>{secret(TEMP_SLOT)}</source></disk>".replace(str(DISK), str(own.owner))
    ours = f"<disk><source file='/a'>{secret()}</source></disk>"
    backend = f"<tpm><backend type='emulator'><encryption secret='{tpm.uuid}'/></backend></tpm>"
    xml = f"<domain><uuid>{ID}</uuid><devices>{temp}{ours}{backend}</devices></domain>"
    definition = DomainDefinition.parse(xml)
    assert definition.vm_secrets == (own, tpm)
    assert definition.secrets == {own, tpm, SecretName(DISK, "service")}
    copy = DomainDefinition.parse(xml.replace(f"<uuid>{ID}", f"<uuid>{uuid4()}"))
    assert copy.vm_secrets == ()


def test_the_user_of_qemu_is_read_from_the_dac_label() -> None:
    label = "<seclabel type='dynamic' model='{}'><label>+64055:+108</label></seclabel>"
    assert DomainDefinition.parse(f"<domain>{label.format('dac')}</domain>").qemu_user == User(64055, 108)
    assert DomainDefinition.parse(f"<domain>{label.format('apparmor')}</domain>").qemu_user is None


def test_the_text_comes_back_and_is_not_printed() -> None:
    """Definitions may hold the passwords of consoles."""
    xml = "<domain><name>d</name><devices><graphics passwd='secret word'/></devices></domain>\n"
    definition = DomainDefinition.parse(xml)
    assert definition.to_xml() == xml
    assert "secret word" not in repr(definition)

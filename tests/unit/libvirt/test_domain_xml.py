from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from virt_sse.libvirt.domain_xml import Behind, DiskSource, DomainDisk, disk_element, free_target, our_disks
from virt_sse.libvirt.references import usage

from support.folders import GOLDEN
from virt_sse.errors import InvalidValueError

DISK = UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")


def source(path: str, driver_type: str = "raw", **other: Any) -> DiskSource:
    return DiskSource(disk_id=DISK, slot="service", driver_type=driver_type, path=Path(path), **other)


BEHIND = Behind(Path(f"/run/virt-sse-disks/{DISK}/guest/nbd"), 30)
ELEMENTS = {
    "disk-qcow2": disk_element(source("/var/lib/libvirt/images/db-01.qcow2", "qcow2"), target="vda"),
    "disk-raw-read-only-scsi": disk_element(
        source('/srv/a & b\'s "disk" <1>, ä.raw'), target="sdb", read_only=True
    ),
    "disk-behind-a-socket": disk_element(
        source("/var/lib/libvirt/images/db-01.qcow2", "qcow2", behind=BEHIND, error_policy="stop"),
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
    place = ET.fromstring(ELEMENTS[name]).find("source")  # noqa: S314 -- our own
    target = ET.fromstring(ELEMENTS[name]).find("target")  # noqa: S314 -- our own
    assert place is not None
    assert target is not None
    expected = place.get("file") or BEHIND.socket
    reconnects = place.find("reconnect") is not None
    assert use == DomainDisk(DISK, "service", Path(expected), target.get("dev", ""), reconnects)


def domain(*disks: str) -> str:
    return f"<domain><name>d</name><devices><emulator/>{''.join(disks)}</devices></domain>"


def secret(slot: str = "service") -> str:
    return f"<encryption format='luks'><secret type='passphrase' usage='{usage(DISK, slot)}'/></encryption>"


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
    disk = ELEMENTS["disk-qcow2"].replace(usage(DISK, "service"), reference)
    with pytest.raises(InvalidValueError, match="names an unknown secret"):
        our_disks(domain(disk))


@pytest.mark.parametrize("text", ["", "<domain>", "no XML", "<a/><b/>", "\0"])
def test_invalid_xml_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="not a domain's XML"):
        our_disks(text)


@pytest.mark.parametrize("target", ["", "vd", "vdA", "vda1", "xvda", "vd a", "vdaaa", "vda\n", "x" * 1000])
def test_an_invalid_target_is_refused(target: str) -> None:
    with pytest.raises(InvalidValueError, match="is no target"):
        disk_element(source("/x"), target=target)


def test_the_bus_follows_the_target() -> None:
    for target, bus in (("vda", "virtio"), ("sdz", "scsi"), ("hdb", "ide"), ("vdaa", "virtio")):
        element = disk_element(source("/x"), target=target)
        assert f'dev="{target}" bus="{bus}"' in element


def test_the_first_free_target_is_chosen() -> None:
    def used(*names: str) -> str:
        return domain(*(f"<disk><target dev='{name}'/></disk>" for name in names))

    assert free_target(used()) == "vda"
    assert free_target(used("vda", "vdc", "sdb")) == "vdb"
    assert free_target(used(*(f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxy"))) == "vdz"
    with pytest.raises(InvalidValueError, match="no free"):
        free_target(used(*(f"vd{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")))

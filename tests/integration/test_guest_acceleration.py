"""The XTS library in the QEMU processes of guests: guests boot, data is the same, and ``vm verify`` tells."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import libvirt
import pytest

from support.images import KeyedImage, opened_by_openssl
from support.nettle_xts import Statistics
from support.stage_site import StageSite, stage_site
from virt_sse.domains.settings import VmChanges
from virt_sse.errors import InvalidValueError, PolicyError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image
from virt_sse.libvirt.qemu_environment import QEMU_NAMESPACE
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.layers import HostCaching
from virt_sse.system import acceleration as tools_acceleration
from virt_sse.system.files import write_shared
from virt_sse.system.guest_library import GuestLibrary

MARKER = b"virt-sse boot-sector marker: "
"""The beginning of the text that the guest writes to sector 1000."""
NO_LIBRARY = "acceleration is on, but the domain's QEMU runs without the library"
UPDATE_ON, UPDATE_OFF = VmChanges(accelerate=True), VmChanges(accelerate=False)


@pytest.fixture(scope="module")
def site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
    """A lab host with the library for guests."""
    if reason := tools_acceleration.obstacle():
        pytest.skip(f"the XTS library: {reason}")
    with stage_site(lab_host, acceleration("boot-sector"), "") as site:
        said = site.virt_sse("host", "init", "--accelerate")
        if "left acceleration off" in said:
            pytest.skip(said)
        assert "times as fast" in said
        yield site
        site.forget_domains()
        site.backend.host.config.guest_library.remove()


@pytest.fixture
def library(site: StageSite) -> Iterator[GuestLibrary]:
    """The library for guests; sound again after the test."""
    found = site.backend.host.config.guest_library
    yield found
    site.forget_domains()
    found.install()


def boot_disk(site: StageSite, name: str, image_format: str) -> Disk:
    return site.backend.transfer.import_image(
        NewDisk(name=name, format=DiskFormat(image_format)),
        boot_sector_image(stays=True),
        source_format="raw",
    )


def define(site: StageSite, guest: Guest, variables: Mapping[str, str]) -> str:
    """Define *guest* with variables of its own for QEMU: the XML, from libvirt."""
    given = "".join(f"<qemu:env name='{name}' value='{value}'/>" for name, value in variables.items())
    xml = guest.xml().replace("<domain ", f"<domain xmlns:qemu='{QEMU_NAMESPACE}' ", 1)
    xml = xml.replace("</domain>", f"<qemu:commandline>{given}</qemu:commandline></domain>")
    with contextlib.closing(site.host.connect()) as connection:
        return str(connection.defineXML(xml).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))


def update(site: StageSite, guest: Guest, changes: VmChanges) -> None:
    site.backend.vms.update(guest.name, changes)


def verify(site: StageSite, guest: Guest, *, status: int = 0) -> dict[str, Any]:
    said = site.virt_sse("vm", "verify", guest.name, "--output", "json", status=status)
    return dict(json.JSONDecoder().raw_decode(said)[0])


def libraries(document: Mapping[str, Any]) -> dict[str, str]:
    return {each["process"]: each["library"] for each in document["processes"]}


def test_a_guest_of_each_layer_boots_with_the_library(
    site: StageSite, library: GuestLibrary, name: str
) -> None:
    """The paths of processors without VAES and without AES-NI, and of a QEMU without nettle, are forced."""
    counts = site.host.images / f"{name}-counts"
    counts.mkdir()
    counts.chmod(0o777)
    disks = [boot_disk(site, f"{name}-{kind}", kind) for kind in ("raw", "qcow2")]
    disks += [site.disk("qcow2"), boot_disk(site, f"{name}-cached", "raw")]
    guests = [site.guest(disk) for disk in disks]
    at_host = VmChanges(encryption_at_host=True, caching={"vda": HostCaching.READ_ONLY}, accelerate=True)
    changes = (UPDATE_ON, UPDATE_ON, UPDATE_ON, at_host)
    paths = (None, "portable", "aesni", "nettle")
    for guest, change, path in zip(guests, changes, paths, strict=True):
        forced = {"VIRT_SSE_XTS": path} if path else {}
        define(site, guest, {"VIRT_SSE_XTS_STATISTICS": str(counts / guest.name), **forced})
        update(site, guest, change)
        site.virsh("start", guest.name)
    for guest in guests:
        guest.wait_for("verified 8 sectors, ok")
    stages = ({}, {}, {"storage daemon of vda": "this version"}, {"host cache of vda": "none"})
    for guest, below in zip(guests, stages, strict=True):
        seen = verify(site, guest)
        assert libraries(seen) == {"guest's QEMU": "this version", **below}
        assert seen["accelerate"]
        site.virsh("destroy", guest.name)
    fast, portable, aesni, nettle = (Statistics.read(counts / guest.name)[0] for guest in guests)
    assert (fast.fast > 0, fast.portable, fast.nettle) == (True, 0, 0)
    assert (portable.fast, portable.portable > 0, portable.nettle) == (0, True, 0)
    assert aesni.path in ("aesni", "portable")
    assert aesni.nettle == 0
    assert (nettle.fast, nettle.portable, nettle.nettle > 0) == (0, 0, True)
    passphrase = KeyedImage.of(site.backend, disks[0]).passphrase
    assert opened_by_openssl(disks[0].path, passphrase, 1000, 8).startswith(MARKER)


def test_data_is_the_same_with_and_without_the_library(site: StageSite, library: GuestLibrary) -> None:
    """Read by QEMU with and without, and by OpenSSL with the volume key from cryptsetup."""
    disk = site.single_disk("raw")
    guest = site.guest(disk)
    for number, change in enumerate((UPDATE_ON, UPDATE_OFF, UPDATE_ON), start=1):
        update(site, guest, change)
        site.start_paused(guest)
        assert site.backend.vms.show(guest.name).is_accelerated == (change is UPDATE_ON)
        for before in range(1, number):
            said = site.qemu_io(guest, f"read -P {before} {64 * before}k 64k")
            assert "read 65536/65536" in said
            assert "failed" not in said
        site.qemu_io(guest, f"write -P {number} {64 * number}k 64k")
        site.virsh("destroy", guest.name)
    image = KeyedImage.of(site.backend, disk)
    for number in (1, 2, 3):
        assert opened_by_openssl(disk.path, image.passphrase, 128 * number, 128) == bytes([number]) * 65536
        assert image.has(65536 * number, 65536, number)


def test_variables_of_the_domain_stay_as_they_were(site: StageSite, library: GuestLibrary) -> None:
    guest = site.guest(site.single_disk())
    define(site, guest, {"MALLOC_ARENA_MAX": "4", "PULSE_SERVER": "none"})
    attach = ("disk", "attach", site.single_disk().name, guest.name)
    assert f"'virt-sse vm update {guest.name} --accelerate on'" in site.virt_sse(*attach)
    before = str(site.virsh("dumpxml", "--inactive", guest.name))
    site.virt_sse("vm", "update", guest.name, "--accelerate", "on")
    update(site, guest, UPDATE_ON)
    assert not site.backend.hotplug.gains_by_acceleration(guest.name)
    definition = site.host.virsh("dumpxml", "--inactive", guest.name).stdout
    assert definition.count(str(library.path)) == 1
    assert definition.count("MALLOC_ARENA_MAX") == 1
    update(site, guest, UPDATE_OFF)
    after = site.host.virsh("dumpxml", "--inactive", guest.name).stdout
    for tag in ("qemu:commandline", "devices"):
        assert _element(after, tag) == _element(before, tag)
    define(site, guest, {"LD_PRELOAD": "/usr/lib/own.so"})
    with pytest.raises(InvalidValueError, match=r"preloads a library of its own: /usr/lib/own\.so"):
        update(site, guest, UPDATE_ON)


def _element(xml: str, tag: str) -> str:
    return xml[xml.index(f"<{tag}>") : xml.index(f"</{tag}>")]


def test_a_domain_whose_library_is_gone_starts_and_is_reported(
    site: StageSite, library: GuestLibrary
) -> None:
    guest = site.guest(site.single_disk())
    update(site, guest, UPDATE_ON)
    site.start_paused(guest)
    content = library.path.read_bytes()
    library.record.write_text(f"{hashlib.sha256(content + b'x').hexdigest()}\n")
    write_shared(library.path, content + b"x")
    assert "is not this version's library" in site.virt_sse("host", "doctor", status=1)
    assert libraries(verify(site, guest)) == {"guest's QEMU": "this version"}
    site.virsh("destroy", guest.name)
    site.start_paused(guest)
    assert libraries(verify(site, guest)) == {"guest's QEMU": "an earlier version"}
    assert "made library" in site.virt_sse("host", "init")
    assert libraries(verify(site, guest)) == {"guest's QEMU": "an earlier version"}
    site.virsh("destroy", guest.name)

    site.virt_sse("host", "init", "--no-accelerate")
    with pytest.raises(PolicyError, match="is missing"):
        update(site, site.guest(site.single_disk()), UPDATE_ON)
    site.start_paused(guest)
    seen = verify(site, guest, status=1)
    assert seen["problems"] == [NO_LIBRARY]
    assert libraries(seen) == {"guest's QEMU": "none"}
    assert f"virt-sse: warning: {NO_LIBRARY}" in site.virt_sse("vm", "show", guest.name)


def test_no_key_goes_to_a_qemu_with_a_library_that_others_may_change(
    site: StageSite, library: GuestLibrary
) -> None:
    disk = site.single_disk()
    guest = site.guest(disk)
    update(site, guest, UPDATE_ON)
    library.path.chmod(0o666)
    assert "other users may write" in site.virsh("start", guest.name, "--paused", status=1)
    library.path.chmod(0o644)
    library.path.write_bytes(b"another")
    assert "not a library that virt-sse has installed" in site.virsh("start", guest.name, status=1)
    library.install()

    foreign = site.host.images / "own.so"  # QEMU's user may write the folder
    define(site, guest, {"LD_PRELOAD": str(foreign)})
    assert f"would load '{foreign}' (LD_PRELOAD)" in site.virsh("start", guest.name, status=1)
    define(site, guest, {"LD_PRELOAD": "libm.so.6"})
    site.start_paused(guest)
    (problem,) = verify(site, guest, status=1)["problems"]
    assert "loads 'libm.so.6' (LD_PRELOAD), which is not virt-sse's and sees the keys" in problem
    assert not site.backend.vms.show(guest.name).is_accelerated

    bare = Guest(site.host, f"{guest.name}-bare", acceleration=site.acceleration)
    define(site, bare, {"LD_PRELOAD": str(foreign)})
    site.start_paused(bare)
    said = site.virt_sse("disk", "attach", site.single_disk().name, bare.name, status=1)
    assert f"would load '{foreign}' (LD_PRELOAD)" in said

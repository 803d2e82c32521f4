"""Placement of DEKs in the storage daemon: guests whose QEMU has no key."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import libvirt
import pytest

from support.agent_site import wait_for_event
from support.process_memory import found_in_memory
from support.stage_site import StageSite, stage_site
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import BOOT_SECTOR_TEXT
from virt_sse.model.disks import Disk
from virt_sse.model.keys import Dek
from virt_sse.model.layers import EncryptionType, HostCaching, Placement
from virt_sse.qemu import image_file
from virt_sse.qemu.reading import plaintext

M = 1 << 20
TYPES = (EncryptionType.CUSTOMER_KEY, EncryptionType.PLATFORM_AND_CUSTOMER_KEYS)


@pytest.fixture(scope="module")
def running_site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
    with stage_site(lab_host, acceleration("boot-sector"), "") as site:
        yield site


@pytest.fixture
def site(running_site: StageSite) -> Iterator[StageSite]:
    yield running_site
    with contextlib.closing(running_site.host.connect()) as connection:
        for domain in connection.listAllDomains():
            for each in domain.listAllSnapshots():
                each.delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    running_site.forget_domains()
    assert running_site.left() == {}


def new_set(site: StageSite, kind: EncryptionType, placement: Placement | None = Placement.STORAGE) -> str:
    made = site.backend.sets.create(
        f"s{uuid.uuid4().hex[:8]}",
        provider="platform-managed",
        key="default",
        encryption_type=kind,
        placement=placement,
    )
    return made.name


def keys(site: StageSite, disk: Disk) -> list[bytes]:
    """All keys of a disk: the DEK and the halves of the volume key of each layer."""
    found = []
    deks = [site.dek(disk, entry.slot) for entry in disk.deks]
    for number, dek in enumerate(deks):
        with TemporaryDirectory() as folder:
            header = Path(folder, "header")
            header.write_bytes(_luks_header(disk, number, deks))
            key = Path(folder, "key")
            subprocess.run(
                ["cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--key-file", "-"]
                + ["--volume-key-file", key, header],
                input=dek.passphrase,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            volume_key = key.read_bytes()
        found += [dek.passphrase, volume_key[:32], *([volume_key[32:]] if volume_key[32:] else [])]
    return found


def _luks_header(disk: Disk, number: int, deks: Sequence[Dek]) -> bytes:
    content = os.memfd_create("volume")
    outer = deks[number + 1 :]
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, content)
        if outer:
            reader = stack.enter_context(plaintext(disk.path, disk.format, outer))
            os.write(content, reader.read(0, 4 * M))
        else:
            os.write(content, disk.path.read_bytes()[: 8 * M])
        offset, length = image_file.luks_area(content, disk.format)
        return os.pread(content, max(length, 2 * M + 4096), offset)


def layers(site: StageSite, guest: Guest, number: int = 0) -> list[tuple[str, str]]:
    return layers_of_all(site, guest)[number]


def layers_of_all(site: StageSite, guest: Guest) -> list[list[tuple[str, str]]]:
    disks = verify(site, guest)["disks"]
    return [[(layer["where"], layer["slot"]) for layer in disk["layers"]] for disk in disks]


def verify(site: StageSite, guest: Guest, *, status: int = 0) -> dict[str, Any]:
    said = site.virt_sse("vm", "verify", guest.name, "--output", "json", status=status)
    document, _ = json.JSONDecoder().raw_decode(said)
    return dict(document)


def objects(site: StageSite, guest: Guest) -> list[str]:
    """The secret objects of a guest's QEMU."""
    query = json.dumps({"execute": "qom-list", "arguments": {"path": "/objects"}})
    answer = json.loads(site.virsh("qemu-monitor-command", guest.name, query))
    return [each["name"] for each in answer["return"] if each["type"].startswith("child<secret")]


def test_the_qemu_of_a_guest_holds_no_key(site: StageSite) -> None:
    sets = [new_set(site, kind) for kind in TYPES]
    disks = [site.disk(kind, encryption_set=name) for name in sets for kind in ("raw", "qcow2")]
    guest = site.guest(*disks)
    guest.start()
    said = guest.wait_for("boot-sector: done")
    assert said.count("verified 8 sectors, ok") == 4
    assert site.secrets() == []
    assert objects(site, guest) == ["masterKey0"], "libvirt's own"
    assert "<encryption" not in site.virsh("dumpxml", guest.name, "--security-info")
    for disk, found in zip(disks, layers_of_all(site, guest), strict=True):
        slots = [entry.slot for entry in disk.deks]
        expected = [*(("storage daemon", slot) for slot in slots), ("image", slots[-1])]
        expected += [("within that", slot) for slot in slots[:-1]]
        assert found == expected

    wanted = [keys(site, disk) for disk in disks]
    everything = list(itertools.chain(*wanted))
    assert [len(found) for found in wanted] == [3, 3, 5, 5]
    assert found_in_memory(site.qemu(guest).pid, everything) == []
    held = [found_in_memory(process.pid, everything) for process in site.stage_processes()]
    volume_keys = [[key for key in found if len(key) == 32] for found in wanted]
    assert sorted(held) == sorted(volume_keys), "each daemon holds the volume keys of its disk, and no DEK"

    guest.destroy()
    assert site.left() == {}
    for disk in disks:
        assert BOOT_SECTOR_TEXT not in disk.path.read_bytes()
        site.backend.disks.check(disk.name)


def test_the_qemu_of_a_guest_with_keys_is_found_to_hold_them(site: StageSite) -> None:
    sets = [new_set(site, kind, Placement.GUEST) for kind in TYPES]
    disks = [site.disk("raw", size=M, encryption_set=name) for name in sets]
    guest = site.guest(*disks)
    site.start_paused(guest)
    wanted = [keys(site, disk) for disk in disks]
    found = found_in_memory(site.qemu(guest).pid, list(itertools.chain(*wanted)))
    assert [key for key in found if len(key) == 32] == [*wanted[0][1:], *wanted[1][1:3]]
    tops = [disk[0] for disk in layers_of_all(site, guest)]
    assert tops == [("guest's QEMU", "service")] * 2


@pytest.mark.parametrize("kind", TYPES)
def test_a_disk_changes_its_placement_at_the_next_start(site: StageSite, kind: EncryptionType) -> None:
    name = new_set(site, kind, None)  # the configured placement
    disk = site.disk("qcow2", size=8 * M, encryption_set=name)
    guest = site.guest(disk)
    site.start_paused(guest)
    assert layers(site, guest)[0] == ("guest's QEMU", "service")
    site.qemu_io(guest, "write -P 0x41 0 64k")
    secrets = site.secrets()
    assert len(secrets) == 1

    site.virt_sse("des", "update", name, "--placement", "storage")
    site.host.restart_libvirtd()
    wait_until(lambda: site.secrets() == secrets, "the running domain's secret is back")
    (problem,) = verify(site, guest, status=1)["problems"]
    assert problem == "vda: the domain was started with placement guest, storage was asked for"
    site.virsh("destroy", guest.name)
    (problem,) = verify(site, guest, status=1)["problems"]
    assert problem == "vda: the definition is not for placement storage, as asked for"
    said = site.virsh("start", guest.name, status=1)
    assert f"the definition of domain '{guest.name}' expects placement guest" in said
    assert f"virt-sse vm update {guest.name} --refresh-disks" in said
    site.virt_sse("vm", "update", guest.name, "--refresh-disks")
    assert f"virt-sse:{disk.id}" in site.virsh("dumpxml", guest.name)
    site.start_paused(guest)
    assert layers(site, guest)[0] == ("storage daemon", "service")
    assert "verification failed" not in site.qemu_io(guest, "read -P 0x41 0 64k")
    site.qemu_io(guest, "write -P 0x42 64k 64k")
    site.virsh("destroy", guest.name)

    site.virt_sse("des", "update", name, "--placement", "guest")
    said = site.virsh("start", guest.name, status=1)
    assert f"the definition of domain '{guest.name}' expects placement storage" in said
    site.virt_sse("vm", "update", guest.name, "--refresh-disks")
    site.start_paused(guest)
    for pattern, offset in ((0x41, 0), (0x42, 64)):
        assert "verification failed" not in site.qemu_io(guest, f"read -P {pattern} {offset}k 64k")
    assert verify(site, guest)["problems"] == []
    envelope = site.backend.disks.get(disk.name).envelope
    assert envelope == disk.envelope


def test_a_disk_is_plugged_in_and_out_resized_and_not_cached(site: StageSite) -> None:
    name = new_set(site, TYPES[1])
    first, second = (site.disk("raw", size=M, encryption_set=name) for _ in "ab")
    guest = site.guest(first)
    site.virt_sse("vm", "update", guest.name, "--encryption-at-host", "on")
    said = site.virt_sse("vm", "update", guest.name, "--disk-caching", "vda=ReadOnly", status=1)
    assert "no host caching with placement storage" in said
    site.start_paused(guest)
    said = site.virt_sse("disk", "attach", second.name, guest.name, "--caching", "ReadWrite", status=1)
    assert "no host caching with placement storage" in said
    site.virt_sse("disk", "attach", second.name, guest.name)
    assert layers(site, guest, 1)[:2] == [("storage daemon", "service"), ("storage daemon", "infrastructure")]
    assert site.secrets() == []
    said = site.virt_sse("disk", "resize", second.name, "2M", status=1)
    assert "cannot grow under a running guest" in said
    site.virsh("destroy", guest.name)
    site.virt_sse("disk", "detach", second.name, guest.name)
    site.virt_sse("disk", "resize", second.name, "2M")
    site.virt_sse("disk", "attach", second.name, guest.name)
    site.start_paused(guest)
    assert "wrote 512/512" in site.qemu_io(guest, f"write {2 * M - 512} 512", disk=1)
    site.virsh("destroy", guest.name)

    cached = site.disk("raw", size=M, encryption_set=new_set(site, TYPES[0], Placement.GUEST))
    site.backend.host.store.vms.set_caching(cached.id, HostCaching.READ_ONLY)
    set_name = site.backend.sets.get(str(cached.set_id)).name
    for command in (["des", "update", set_name, "--placement", "storage"],):
        assert "not supported with placement storage" in site.virt_sse(*command, status=1)


def test_a_definition_with_the_socket_of_another_disk_is_refused(site: StageSite) -> None:
    name = new_set(site, TYPES[0])
    ours, other = (site.disk("raw", size=M, encryption_set=name) for _ in "ab")
    guest = site.guest(ours)
    socket = site.backend.domains.source(other).place
    xml = guest.xml().replace(str(site.backend.domains.source(ours).place), str(socket))
    with contextlib.closing(site.host.connect()) as connection:
        connection.defineXML(xml)
    said = site.virsh("start", guest.name, status=1)
    assert f"vda is disk '{ours.name}' but has the source {socket}" in said


def test_plaintext_beside_such_a_disk_is_found(site: StageSite) -> None:
    disk = site.disk("raw", size=8 * M, encryption_set=new_set(site, TYPES[0]))
    guest, folder = site.guest(disk), site.host.images
    site.start_paused(guest)
    path = site.backend.host.config.root / "etc/virt-sse/config.toml"
    path.write_text("[agent]\npoll-seconds = 0.3\n")
    with LabAgent(site.host) as running:
        overlay = folder / f"{disk.name}.overlay"
        spec = ("--diskspec", f"vda,file={overlay}")
        site.virsh("snapshot-create-as", guest.name, "s", "--disk-only", *spec)
        event = {"domain": guest.name, "kind": "overlay", "place": str(overlay)}
        wait_for_event(running, "plaintext-link", **event)
        problems = verify(site, guest, status=1)["problems"]
        assert problems == [f"vda: overlay {overlay} is not encrypted"]
        site.qemu_io(guest, "write -P 0x41 0 64k")
        site.virsh("blockcommit", guest.name, "vda", "--active", "--pivot")
        site.virsh("snapshot-delete", guest.name, "s", "--metadata")
        wait_for_event(running, "plaintext-link-gone", **event)
        assert verify(site, guest)["problems"] == []
        assert "verification failed" not in site.qemu_io(guest, "read -P 0x41 0 64k")

        with backup(site, guest, f"<scratch file='{folder}/{disk.name}.scratch'/>"):
            wait_for_event(running, "plaintext-link", domain=guest.name, kind="backup")
            assert any("is not encrypted" in each for each in verify(site, guest, status=1)["problems"])
        assert verify(site, guest)["problems"] == []

        made = {"qom-type": "secret", "data": "x"}
        node = json.loads(site.virsh("qemu-monitor-command", guest.name, NODES))["return"][0]["node-name"]
        added = {"execute": "object-add", "arguments": made | {"id": f"{node}-encryption-secret0"}}
        site.virsh("qemu-monitor-command", guest.name, json.dumps(added))
        (problem,) = verify(site, guest, status=1)["problems"]
        assert problem.endswith(f": {node}-encryption-secret0")
        assert "the guest's QEMU has keys for " in problem

        copy = folder / f"{disk.name}.copy"
        options = ("--transient-job", "--wait")
        site.virsh("blockcopy", guest.name, "vda", "--dest", copy, *options)
        wait_for_event(running, "plaintext-link", domain=guest.name, kind="mirror", place=str(copy))
        assert f"vda: mirror {copy} is not encrypted" in verify(site, guest, status=1)["problems"]
        site.virsh("blockjob", guest.name, "vda", "--pivot")
        event = {"kind": "image in its place", "place": str(copy)}
        wait_for_event(running, "plaintext-link", domain=guest.name, **event)
        assert verify(site, guest, status=1)["problems"]
    path.write_text("")


NODES = '{"execute": "query-named-block-nodes", "arguments": {"flat": true}}'


@contextlib.contextmanager
def backup(site: StageSite, guest: Guest, target: str) -> Iterator[None]:
    """A backup in pull mode, until the end of the block."""
    server = f"<server transport='unix' socket='{site.host.images}/{guest.name}.nbd'/>"
    disks = f"<disks><disk name='vda' type='file'>{target}</disk></disks>"
    description = site.host.directory / "backup.xml"
    description.write_text(f"<domainbackup mode='pull'>{server}{disks}</domainbackup>")
    site.virsh("backup-begin", guest.name, description)
    try:
        yield
    finally:
        site.virsh("domjobabort", guest.name)

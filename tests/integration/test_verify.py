"""``virt-sse vm verify``, and the agent's watch for images without encryption, on a lab host.

The guests stand still: what they would write is written by QEMU, through their devices.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import libvirt
import pytest

import virt_sse.agent.overlay_commit
import virt_sse.agent.overlay_commit_record
import virt_sse.system.overwrite
from support.agent_site import wait_for_event
from support.faults import crash_points, dies_at
from support.images import KeyedImage
from support.stage_site import StageSite, stage_site
from support.waiting import wait_until
from virt_sse.agent.overlay_commit import OverlayCommit
from virt_sse.agent.overlay_commit_record import OverlayCommitRecord
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest, disk_xml
from virt_sse.lab.host import LabHost
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import formatting, luks
from virt_sse.qemu.formatting import Volume

M = 1 << 20


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


def verify(site: StageSite, guest: Guest, *options: str, status: int = 0) -> dict[str, Any]:
    said = site.virt_sse("vm", "verify", guest.name, "--output", "json", *options, status=status)
    document, end = json.JSONDecoder().raw_decode(said)
    assert document["as-asked"] is (status == 0)
    assert ("virt-sse: error: " in said[end:]) is (status == 1)
    return dict(document)


def layers(document: dict[str, Any], number: int = 0) -> list[tuple[str, str, str | None]]:
    disk = document["disks"][number]
    return [(layer["where"], layer["cipher"], layer["slot"]) for layer in disk["layers"]]


XTS, CBC = "aes-256-xts", "aes-256-cbc-essiv:sha256"
GUEST = ("guest's QEMU", XTS, "service")
STORAGE = ("storage daemon", CBC, "infrastructure")
CACHE = ("host cache", "holds ciphertext", None)
DOUBLE_IMAGE = [("image", CBC, "infrastructure"), ("within that", XTS, "service")]


def test_verify_reports_the_layers_that_were_asked_for(site: StageSite) -> None:
    one, two = site.guest(site.single_disk("raw")), site.guest(site.disk("qcow2"))
    cached = site.guest(site.disk("raw"))
    at_host = ("--encryption-at-host", "on", "--temp-disk-size", "1M", "--disk-caching", "vda=ReadWrite")
    site.virt_sse("vm", "update", cached.name, *at_host)
    assert layers(verify(site, one)) == [("image", XTS, "service")]
    assert layers(verify(site, cached)) == DOUBLE_IMAGE
    for guest in (one, two, cached):
        site.start_paused(guest)
    site.qemu_io(cached, "write -P 0x41 0 512k")
    assert layers(verify(site, one)) == [GUEST, ("image", XTS, "service")]
    assert layers(verify(site, two)) == [GUEST, STORAGE, *DOUBLE_IMAGE]
    seen = verify(site, cached)
    assert layers(seen) == [GUEST, STORAGE, CACHE, *DOUBLE_IMAGE]
    sampled = re.search(r"sectors sampled: (\d+) ciphertext", seen["disks"][0]["layers"][2]["detail"])
    assert sampled
    assert int(sampled[1]) > 200
    assert layers(seen, 1) == [("guest's QEMU", XTS, "temp"), ("image", XTS, "temp")]
    assert not any(place["is-plaintext"] for disk in seen["disks"] for place in disk["places"])
    table = site.virt_sse("vm", "verify", cached.name)
    assert "as-asked            yes" in table
    assert "plaintext   the guest's memory, and its QEMU's" in table


def test_an_inner_header_rebuilt_under_a_running_guest_is_reported(site: StageSite) -> None:
    """The writer has the outer layer: an escaped guest's QEMU, or a storage daemon that was taken over."""
    disk = site.disk("raw", size=M)
    guest = site.guest(disk)
    site.start_paused(guest)
    verify(site, guest)
    header = luks.make_header(AES_256_XTS, site.dek(disk, "service"))
    rebuilt = site.host.images / f"{disk.name}.header"
    rebuilt.write_bytes(header)
    outer = KeyedImage(disk.path, "raw", site.dek(disk, "infrastructure").passphrase)
    written = outer.io(f"write -s {rebuilt} 0 {len(header)}")
    assert written.returncode == 0, written.stderr
    (problem,) = verify(site, guest, status=1)["problems"]
    assert "the LUKS header of the inner layer was changed" in problem
    guest.destroy()
    (problem,) = verify(site, guest, status=1)["problems"]
    assert "the LUKS header of the inner layer was changed" in problem
    assert "header of the inner layer" in site.virsh("start", guest.name, status=1)


def test_an_overlay_must_be_encrypted_as_its_disk(site: StageSite) -> None:
    other, another_dek = uuid.uuid4(), Dek.generate()
    with contextlib.closing(site.host.connect()) as connection:
        xml = f"<secret ephemeral='yes' private='yes'><uuid>{other}</uuid></secret>"
        connection.secretDefineXML(xml).setValue(another_dek.passphrase)
    for disk, is_ours, problem in (
        (site.single_disk(), True, None),
        (site.single_disk(), False, "is not encrypted under the disk's key"),
        (site.disk(size=8 * M), True, "has only one layer of encryption"),
    ):
        guest, overlay = site.guest(disk), site.host.images / f"{disk.name}.overlay"
        dek = site.dek(disk, "service") if is_ours else another_dek
        key = f"usage='virt-sse:{disk.id}:service'" if is_ours else f"uuid='{other}'"
        formatting.make(overlay, disk.format, disk.size, [Volume(AES_256_XTS, dek)])
        secret = f"<secret type='passphrase' {key}/>"
        snapshot = overlay.with_suffix(".xml")
        snapshot.write_text(
            "<domainsnapshot><disks><disk name='vda' snapshot='external' type='file'><driver type='qcow2'/>"
            f"<source file='{overlay}'><encryption format='luks'>{secret}</encryption></source>"
            "</disk></disks></domainsnapshot>"
        )
        site.start_paused(guest)
        site.virsh("snapshot-create", guest.name, snapshot, "--disk-only", "--reuse-external")
        seen = verify(site, guest, status=1 if problem else 0)
        assert seen["problems"] == ([f"vda: overlay {overlay} {problem}"] if problem else [])
        assert {"where": f"overlay {overlay}", "is-plaintext": False} in seen["disks"][0]["places"]
        site.virsh("snapshot-delete", guest.name, "--current", "--metadata")
        guest.destroy()


def test_a_backup_under_the_disks_key_is_no_leak(site: StageSite) -> None:
    disk = site.single_disk("raw")
    guest, scratch = site.guest(disk), site.host.images / f"{disk.name}.scratch"
    formatting.make(scratch, DiskFormat.QCOW2, disk.size, [Volume(AES_256_XTS, site.dek(disk, "service"))])
    site.start_paused(guest)
    secret = f"<secret type='passphrase' usage='virt-sse:{disk.id}:service'/>"
    inner = f"<encryption format='luks'>{secret}</encryption>"
    reuse = libvirt.VIR_DOMAIN_BACKUP_BEGIN_REUSE_EXTERNAL
    with backup(site, guest, f"<scratch file='{scratch}'>{inner}</scratch>", flags=reuse):
        seen = verify(site, guest, status=1)
        (problem,) = seen["problems"]
        assert "plaintext leaves QEMU through the NBD export" in problem
        assert {"where": f"backup {scratch}", "is-plaintext": False} in seen["disks"][0]["places"]


def test_plaintext_beside_a_disk_is_found(site: StageSite) -> None:
    disk = site.disk("raw")
    guest, image = site.guest(disk), site.host.images / disk.name

    def problems(status: int = 1) -> list[str]:
        return list(verify(site, guest, status=status)["problems"])

    site.start_paused(guest)
    overlay = ("snapshot-create-as", guest.name, "--disk-only", "--diskspec", f"vda,file={image}.overlay")
    site.virsh(*overlay)
    assert problems() == [f"vda: overlay {image}.overlay is not encrypted"]
    site.virsh("blockcommit", guest.name, "vda", "--active", "--pivot")
    site.virsh("snapshot-delete", guest.name, "--current", "--metadata")

    copy = ("blockcopy", guest.name, "vda", "--dest", f"{image}.copy", "--transient-job", "--wait")
    site.virsh(*copy, "--format", "raw")
    assert problems() == [f"vda: mirror {image}.copy is not encrypted"]
    site.virsh("blockjob", guest.name, "vda", "--abort")

    with backup(site, guest, f"<scratch file='{image}.scratch'/>"):
        scratch, export = problems()
        assert scratch == f"vda: backup {image}.scratch is not encrypted"
        assert "plaintext leaves QEMU" in export
    assert problems(0) == []

    site.virsh(*overlay[:-1], f"vda,file={image}.off")
    site.virsh("destroy", guest.name)
    assert problems() == [f"vda: overlay {image}.off is not encrypted"]


@contextlib.contextmanager
def backup(site: StageSite, guest: Guest, place: str, *, flags: int = 0) -> Iterator[None]:
    """One that is under way, to a target or with a scratch file."""
    pull = f"<server transport='unix' socket='{site.host.images}/{guest.name}.nbd'/>"
    mode, server = ("pull", pull) if place.startswith("<scratch") else ("push", "")
    disks = f"<disks><disk name='vda' type='file'>{place}</disk></disks>"
    with contextlib.closing(site.host.connect()) as connection:
        domain = connection.lookupByName(guest.name)
        domain.backupBegin(f"<domainbackup mode='{mode}'>{server}{disks}</domainbackup>", None, flags)
        yield
        if mode == "pull":
            domain.abortJob()


def test_the_target_of_a_backup_is_found(site: StageSite) -> None:
    guest = site.guest(site.single_disk("raw"))
    site.virt_sse("vm", "update", guest.name, "--encryption-at-host", "on", "--disk-caching", "vda=ReadOnly")
    site.start_paused(guest)
    target = site.host.images / f"{guest.name}.target"
    (cache,) = site.stage_processes()
    os.kill(cache.pid, signal.SIGSTOP)  # or the backup would be over before anybody looks
    with backup(site, guest, f"<target file='{target}'/>"):
        assert verify(site, guest, status=1)["problems"] == [f"vda: backup {target} is not encrypted"]
        with agent(site, "warn") as running:
            wait_for_event(running, "plaintext-link", kind="backup", place=str(target))
            os.kill(cache.pid, signal.SIGCONT)
            wait_for_event(running, "plaintext-link-gone", kind="backup", place=str(target))
    assert verify(site, guest)["problems"] == []


def test_foreign_replaced_and_unserved_disks_are_found(site: StageSite) -> None:
    disk, other = site.disk("qcow2"), site.single_disk()
    guest, beside = site.guest(disk), site.guest(other)
    plain = site.host.images / f"{disk.name}.plain"
    plain.write_bytes(bytes(M))
    site.start_paused(guest)
    site.start_paused(beside)
    site.virsh("attach-disk", beside.name, plain, "vdb", "--live")
    assert verify(site, beside)["disks"][1]["disk"] is None
    assert verify(site, beside, "--strict", status=1)["problems"] == [
        "vdb: not a disk of virt-sse, and in plaintext"
    ]

    third = site.single_disk("raw")
    site.virsh("attach-disk", beside.name, third.path, "vdc", "--live")
    assert verify(site, beside, status=1)["problems"] == [
        f"vdc: without its key, the domain has {third.path}, the image of disk {third.name!r}: "
        "writes damage it"
    ]
    site.virsh("destroy", beside.name)
    site.start_paused(beside)

    moved = other.path.with_suffix(".moved")
    other.path.rename(moved)
    shutil.copy(moved, other.path)
    (problem,) = verify(site, beside, status=1)["problems"]
    assert problem == f"vda: the guest's QEMU has another file open than {other.path}: it was replaced"
    moved.rename(other.path)
    assert verify(site, beside)["problems"] == []

    moved = disk.path.with_suffix(".moved")
    disk.path.rename(moved)
    shutil.copy(other.path, disk.path)
    problems = verify(site, guest, status=1)["problems"]
    assert f"vda: the storage daemon has another file open than {disk.path}: it was replaced" in problems
    assert f"vda: {disk.path} is the image of another disk: it was replaced" in problems
    assert f"vda: the image is encrypted with {XTS}, not {CBC}" in problems
    moved.rename(disk.path)
    (daemon,) = site.stage_processes()
    os.kill(daemon.pid, signal.SIGKILL)
    assert verify(site, guest, status=1)["problems"] == ["vda: the storage daemon does not run"]
    assert "no domain" in site.virt_sse("vm", "verify", "nowhere", status=1)


def test_a_copy_that_took_the_place_of_a_disk_is_found(site: StageSite) -> None:
    disk = site.single_disk()
    guest, copy = site.guest(disk), site.host.images / f"{disk.name}.copy"
    site.start_paused(guest)
    site.virsh("blockcopy", guest.name, "vda", "--dest", copy, "--transient-job", "--wait", "--pivot")
    problems = verify(site, guest, status=1)["problems"]
    assert f"vda: the guest's device is on {copy}, which is not encrypted" in problems
    with agent(site, "warn") as running:
        kind = {"kind": "image in its place", "place": str(copy)}
        wait_for_event(running, "plaintext-link", domain=guest.name, **kind)
    site.virsh("destroy", guest.name)
    assert (
        f"vda: the definition has {copy}, which is not encrypted by virt-sse"
        in (verify(site, guest, status=1)["problems"])
    )


@contextlib.contextmanager
def agent(site: StageSite, policy: str, poll_seconds: float = 0.3) -> Iterator[LabAgent]:
    path = site.backend.host.config.root / "etc/virt-sse/config.toml"
    path.write_text(f'[agent]\npoll-seconds = {poll_seconds}\nplaintext = "{policy}"\n')
    try:
        with LabAgent(site.host) as running:
            yield running
    finally:
        path.write_text("")


def test_the_agent_reports_a_link_once_and_pauses_the_guest_while_the_link_exists(site: StageSite) -> None:
    disk = site.single_disk()
    guest, overlay = site.guest(disk), site.host.images / f"{disk.name}.overlay"
    guest.define()
    site.virsh("start", guest.name)
    with agent(site, "warn") as running:
        site.virsh("snapshot-create-as", guest.name, "--disk-only", "--diskspec", f"vda,file={overlay}")
        waited = wait_for_event(running, "plaintext-link", domain=guest.name)
        assert waited < 3
        time.sleep(1)
        (event,) = running.events("plaintext-link", domain=guest.name)
        assert (event["kind"], event["place"]) == ("overlay", str(overlay))
        metrics = running.metrics()
        assert metrics["virt_sse_agent_plaintext_links"] == 1
        assert metrics['virt_sse_agent_plaintext_links_found_total{kind="overlay"}'] == 1
        assert guest.is_active()
        assert site.state(guest)[0] == libvirt.VIR_DOMAIN_RUNNING
    with agent(site, "pause") as running:
        wait_until(lambda: site.state(guest)[0] == libvirt.VIR_DOMAIN_PAUSED, "the guest is paused")
        site.virsh("blockcommit", guest.name, "vda", "--active", "--pivot")
        wait_until(lambda: site.state(guest)[0] == libvirt.VIR_DOMAIN_RUNNING, "the guest runs")
        with backup(site, guest, f"<scratch file='{overlay}.scratch'/>"):
            wait_until(lambda: site.state(guest)[0] == libvirt.VIR_DOMAIN_PAUSED, "the guest is paused")
            assert running.events("plaintext-link", domain=guest.name, kind="backup")
        wait_until(lambda: site.state(guest)[0] == libvirt.VIR_DOMAIN_RUNNING, "the guest runs")


def test_an_image_of_ours_without_its_key_is_refused_at_start_and_found_when_attached(
    site: StageSite,
) -> None:
    disk = site.single_disk("raw")
    keyless = disk_xml(disk.path)
    foreign = Guest(site.host, f"{disk.name}-f", acceleration=site.acceleration, disks=[keyless])
    foreign.define()
    refused = f"vda is {disk.path}, the image of disk '{disk.name}', without its key"
    assert refused in site.virsh("start", foreign.name, status=1)
    link = site.host.images / f"{disk.name}.link"
    link.symlink_to(disk.path)
    guest = site.guest(site.single_disk())
    site.virsh("attach-disk", guest.name, link, "vdb", "--config")
    assert "without its key" in site.virsh("start", guest.name, status=1), (
        "for a domain of ours, also by a link"
    )
    site.virsh("detach-disk", guest.name, "vdb", "--config")
    site.virsh("attach-disk", guest.name, disk.path, "vdb", "--config", "--mode", "readonly")
    site.start_paused(guest)  # reading does no damage
    site.virsh("destroy", guest.name)
    plain = site.host.images / f"{disk.name}.plain"
    plain.write_bytes(bytes(M))
    foreign = Guest(site.host, f"{disk.name}-g", acceleration=site.acceleration, disks=[disk_xml(plain)])
    foreign.define()
    site.start_paused(foreign)
    with agent(site, "warn") as running:
        site.virsh("attach-disk", foreign.name, disk.path, "vdb", "--live")
        found = {"domain": foreign.name, "kind": "keyless image", "place": str(disk.path), "target": "vdb"}
        assert wait_for_event(running, "plaintext-link", **found) < 3
        site.virsh("detach-disk", foreign.name, "vdb", "--live")


def test_a_disk_grown_by_virsh_is_known_at_once_and_never_shrunk_silently(site: StageSite) -> None:
    disk = site.disk("qcow2", size=M)
    guest = site.guest(disk)
    site.start_paused(guest)

    def stored() -> int:
        return site.backend.disks.get(disk.name).size

    site.virsh("blockresize", guest.name, "vda", "4M")
    assert stored() == M, "the size is encrypted"
    assert "--shrink" in site.virt_sse("disk", "resize", disk.name, "2M", status=2)
    assert stored() == 4 * M
    with agent(site, "warn") as running:
        site.virsh("blockresize", guest.name, "vda", "8M")
        wait_for_event(running, "disk-resized", disk=disk.name, to=8 * M)
        assert stored() == 8 * M
        assert verify(site, guest)["problems"] == []
        site.virsh("blockresize", guest.name, "vda", "400M")
        wait_for_event(running, "disk-beyond-room", disk=disk.name, to=400 * M)
    (problem,) = verify(site, guest, status=1)["problems"]
    assert "was grown to 419430400 bytes, and the process below QEMU has room for" in problem
    assert has(site, guest, 0, "0")
    site.qemu_io(guest, "write -P 1 0 64k")
    assert "write failed" in site.qemu_io(guest, "write -P 2 64k 127M")
    assert has(site, guest, 1, "0"), "a write past the end damages no other data"
    site.virsh("destroy", guest.name)
    site.backend.host.store.set_size(disk.id, M)
    assert "--shrink" in site.virt_sse("disk", "resize", disk.name, "2M", status=2)
    assert stored() == 400 * M
    site.virt_sse("disk", "check", disk.name)
    site.start_paused(guest)
    assert verify(site, guest)["problems"] == [], "the next start has room"
    assert has(site, guest, 1, "0")


def test_a_copy_between_two_polls_is_reported(site: StageSite) -> None:
    disk = site.single_disk("raw")
    guest, copy = site.guest(disk), site.host.images / f"{disk.name}.out"
    site.virt_sse("vm", "update", guest.name, "--encryption-at-host", "on")
    site.start_paused(guest)
    with agent(site, "warn", poll_seconds=30) as running:
        wait_for_event(running, "libvirt-connected")

        def is_reported(kind: str) -> bool:
            return any(
                running.events(name, domain=guest.name, kind=kind)
                for name in ("plaintext-link", "copy-unseen")
            )

        job = ("--transient-job", "--wait", "--finish")
        site.virsh("blockcopy", guest.name, "vda", "--dest", copy, *job)
        wait_until(lambda: is_reported("mirror"), "the copy is reported", seconds=10)
        with contextlib.closing(site.host.connect()) as connection:
            domain = connection.lookupByName(guest.name)
            domain.backupBegin("<domainbackup/>", None)
        wait_until(lambda: is_reported("backup"), "the backup is reported", seconds=10)
        wait_for_event(running, "plaintext-beside", disk=disk.name)
        saved = site.host.directory / f"{disk.name}.save"
        site.virsh("save", guest.name, saved)
        wait_for_event(running, "memory-saved", domain=guest.name)
        site.virsh("restore", saved)
    (backup,) = site.host.images.glob(f"{disk.path.name}.*")
    backup.unlink()


def snapshot(site: StageSite, guest: Guest, name: str) -> Path:
    """Make one without encryption; the overlay."""
    overlay = site.host.images / f"{guest.name}.{name}"
    spec = ("--diskspec", f"vda,file={overlay}")
    site.virsh("snapshot-create-as", guest.name, name, "--disk-only", *spec)
    return overlay


def has(site: StageSite, guest: Guest, pattern: int, offset: str) -> bool:
    return "verification failed" not in site.qemu_io(guest, f"read -P {pattern:#x} {offset} 64k")


def test_the_agent_commits_overlays_and_overwrites_them(site: StageSite) -> None:
    guest = site.guest(site.disk("raw", size=8 * M))
    site.start_paused(guest)
    site.qemu_io(guest, "write -P 1 0 64k")
    first = snapshot(site, guest, "one")
    site.qemu_io(guest, "write -P 2 64k 64k")
    second = snapshot(site, guest, "two")
    site.qemu_io(guest, "write -P 3 128k 64k")
    kept = second.with_suffix(".kept")
    kept.hardlink_to(second)
    assert bytes([3]) * 4096 in kept.read_bytes()
    with agent(site, "commit") as running:
        wait_for_event(running, "folded", domain=guest.name)
        commits = 'virt_sse_agent_domain_actions_total{action="fold"}'
        wait_until(lambda: running.metrics().get(commits) == 1, "the metrics count one commit")
        wait_until(
            lambda: running.metrics()["virt_sse_agent_plaintext_links"] == 0,
            "the metrics count no plaintext link",
        )
    assert not first.exists()
    assert not second.exists()
    assert bytes([3]) * 4096 not in kept.read_bytes(), "its content was overwritten"
    assert site.virsh("snapshot-list", guest.name, "--name").split() == []
    assert verify(site, guest)["problems"] == []
    assert all(has(site, guest, number + 1, f"{64 * number}k") for number in range(3))
    site.virsh("destroy", guest.name)
    site.start_paused(guest)
    assert all(has(site, guest, number + 1, f"{64 * number}k") for number in range(3))


def test_a_killed_commit_is_continued(site: StageSite) -> None:
    guest = site.guest(site.single_disk())
    folder = site.backend.host.config.state_directory / "folds"
    with contextlib.closing(site.host.connect()) as connection:
        vm_id = uuid.UUID(connection.lookupByName(guest.name).UUIDString())

    def commit(record: OverlayCommitRecord | None = None) -> None:
        assert OverlayCommit(site.host.uri, folder, vm_id, "vda", threading.Event()).run(record)

    site.start_paused(guest)
    modules = [virt_sse.agent.overlay_commit, virt_sse.agent.overlay_commit_record, virt_sse.system.overwrite]
    snapshot(site, guest, "s")
    points = crash_points(modules, commit)
    for number, point in enumerate(points[len(points) // 8 :: len(points) // 8], start=1):
        overlay = snapshot(site, guest, f"s{number}")
        site.qemu_io(guest, f"write -P {number} 0 64k")
        assert dies_at(point, modules, commit)
        records = OverlayCommitRecord.read_all(folder)
        commit(records[0] if records else None)
        assert not overlay.exists()
        assert OverlayCommitRecord.read_all(folder) == []
        assert has(site, guest, number, "0")
        assert site.virsh("snapshot-list", guest.name, "--name").split() == []
    assert verify(site, guest)["problems"] == []


def test_an_overlay_whose_commit_is_unproven_is_kept(site: StageSite) -> None:
    guest = site.guest(disk := site.single_disk())
    site.start_paused(guest)
    overlay = snapshot(site, guest, "s")
    folder = site.backend.host.config.state_directory / "folds"
    with contextlib.closing(site.host.connect()) as connection:
        domain = connection.lookupByName(guest.name)
        found = (overlay.stat().st_dev, overlay.stat().st_ino)
        record = OverlayCommitRecord(
            uuid.UUID(domain.UUIDString()),
            guest.name,
            "vda",
            disk.id,
            "token",
            (virt_sse.agent.overlay_commit_record.Overlay(overlay, found),),
        )
        domain.destroy()
        domain.snapshotLookupByName("s").delete(libvirt.VIR_DOMAIN_SNAPSHOT_DELETE_METADATA_ONLY)
    record.write(folder)
    guest.define()  # without the overlay
    with agent(site, "commit") as running:
        wait_for_event(running, "fold-unclear")
        site.start_paused(guest)
        time.sleep(1)
        assert overlay.exists()
        overlay.unlink()
        site.virsh("destroy", guest.name)
        running.stop()
        running.start()
        wait_until(lambda: not OverlayCommitRecord.read_all(folder), "no record of a commit is left")

"""Deleted disks: what still counts them, what refuses them, recovery and purge."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from support.images import KeyedImage
from support.stores import execute
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.purge_watch import PurgeWatch
from virt_sse.audit.log import AuditLog
from virt_sse.backend import Backend
from virt_sse.disks.copies import new_copy
from virt_sse.errors import DiskExistsError, DiskStateError, ImageError, StaleImageError
from virt_sse.keys.unfinished_work import has_unfinished_work
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskState, NewDisk

M = 1 << 20
DAY = timedelta(days=1)


@pytest.fixture
def root(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with a libvirt, which has no domain with a disk."""
    images.require("qemu-img", "qemu-io", "cryptsetup")
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "test:///default")
    return root


@pytest.fixture
def disk(backend: Backend) -> Disk:
    made = backend.disks.create(NewDisk(name="web", size=M))
    KeyedImage.of(backend, made).write(0, M, 0x66)
    return made


def let_pass(backend: Backend, disk: Disk, days: int) -> None:
    """Let so many days pass for a deleted disk."""
    purge = backend.disks.get(disk.name).scheduled_purge
    assert purge
    values = {"purge": (purge - days * DAY).isoformat(), "name": disk.name}
    execute(
        backend.host.config.store_url,
        "UPDATE disks SET scheduled_purge = :purge WHERE name = :name",
        **values,
    )


def decisions(backend: Backend, disk: Disk) -> list[str]:
    """The decisions on a disk in the audit log."""
    found = [each.document["action"] for each in AuditLog.of_host(backend.host.config).records(disk=disk.id)]
    return [str(action) for action in found if action not in ("wrap", "unwrap")]


def test_a_deleted_disk_is_recovered_as_it_was(backend: Backend, disk: Disk) -> None:
    planned = backend.soft_deletion.delete("web", dry_run=True)
    assert backend.disks.get("web") == disk
    deleted = backend.soft_deletion.delete("web")
    assert deleted.state is planned.state is DiskState.DELETED
    assert deleted.deleted
    assert deleted.scheduled_purge == deleted.deleted + 7 * DAY
    assert abs(datetime.now(UTC) - deleted.deleted) < timedelta(minutes=10)
    assert backend.disks.get("web") == deleted == backend.host.store_reads.get("web")
    assert disk.path.exists()
    assert not has_unfinished_work(backend.host.config, backend.host.store_reads)
    assert backend.soft_deletion.recover("web") == disk
    backend.disks.check("web")
    assert KeyedImage.of(backend, disk).has(0, M, 0x66)
    assert decisions(backend, disk) == ["delete", "recover"]


USES: dict[str, Callable[[Backend, Path], object]] = {
    "deleted again": lambda b, _: b.soft_deletion.delete("web"),
    "resized": lambda b, _: b.disks.resize("web", 2 * M),
    "exported": lambda b, folder: b.transfer.export("web", folder / "x", destination_format="raw"),
    "copied": lambda b, _: b.copies.copy([NewDisk(name="copy", source=b.disks.get("web"))]),
    "snapshotted": lambda b, _: b.copies.copy([new_copy(b.disks.get("web"), "s", DiskKind.SNAPSHOT)]),
    "backed up": lambda b, folder: b.restore_points.create("web", folder),
    "made an image": lambda b, _: b.images.create("base", "web"),
    "attached": lambda b, _: b.hotplug.attach("web", "test"),
    "put into a definition": lambda b, _: b.domains.disk_element("web"),
    "trusted": lambda b, _: b.disks.trust("web"),
    "inspected": lambda b, _: b.inspector.disk(b.disks.get("web")),
}


def test_a_deleted_disk_is_of_no_use(backend: Backend, disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(DiskStateError, match="disk 'web' is not deleted, but ready"):
        backend.soft_deletion.purge("web")
    backend.soft_deletion.delete("web")
    for name, use in USES.items():
        with pytest.raises(DiskStateError, match="disk 'web' is deleted") as caught:
            pytest.fail(f"a deleted disk is {name}: {use(backend, tmp_path)}")
        assert caught.value.hint == "'virt-sse disk recover web' makes the disk usable again", name
    assert [each.name for each in backend.host.store.all()] == ["web"]


def test_a_domain_with_a_deleted_disk_does_not_start(backend: Backend, disk: Disk) -> None:
    element = backend.domains.disk_element("web")
    backend.soft_deletion.delete("web")
    xml = (
        "<domain type='kvm'><name>vm</name><uuid>0b2d2d1c-9d3c-4a83-9d0c-7a1d5a3f8f10</uuid>"
        f"<devices>{element}</devices></domain>"
    )
    with pytest.raises(DiskStateError, match="disk 'web' is deleted"):
        backend.domains.prepare(DomainDefinition.parse(xml))


def test_the_name_and_the_path_of_a_deleted_disk_stay_taken(backend: Backend, disk: Disk, root: Path) -> None:
    backend.soft_deletion.delete("web")
    for new in (NewDisk(name="web", size=M), NewDisk(name="web", size=M, place=root / "elsewhere.qcow2")):
        with pytest.raises(DiskExistsError, match="exists already") as caught:
            backend.disks.create(new)
        assert caught.value.hint
        assert "'virt-sse disk recover' recovers it, 'virt-sse disk purge' destroys it" in caught.value.hint
    assert not (root / "elsewhere.qcow2").exists()
    with pytest.raises(DiskExistsError, match="the store has this disk as 'web'"):
        backend.disks.adopt(disk.path)


def test_rotation_and_proofs_include_deleted_disks(backend: Backend, disk: Disk) -> None:
    backend.soft_deletion.delete("web")
    version, report = backend.keys.rotate(PLATFORM_KEY)
    assert (report.rewrapped, report.failed) == (1, {})
    assert [use.key for use in backend.keys.in_use()] == [version]
    proofs = backend.keys.prove([backend.disks.get("web")], lambda _: None)
    assert [proof.problem for proof in proofs] == [None] * 3
    backend.disks.check("web")
    backend.soft_deletion.recover("web")
    assert KeyedImage.of(backend, backend.disks.get("web")).has(0, M, 0x66)


def test_a_purged_disk_is_gone_for_good(backend: Backend, disk: Disk, root: Path) -> None:
    copy = root / "copy.qcow2"
    backend.soft_deletion.delete("web")
    copy.write_bytes(disk.path.read_bytes())
    backend.soft_deletion.purge("web", dry_run=True)
    assert backend.disks.get("web").state is DiskState.DELETED
    backend.soft_deletion.purge("web", certified=True)
    assert not disk.path.exists()
    assert backend.host.store.all() == []
    assert backend.keys.in_use() == []
    assert backend.certificates.get("web").statement.image == "erased"
    with pytest.raises(StaleImageError, match="was deleted on this host"):
        backend.disks.adopt(copy)
    assert decisions(backend, disk) == ["delete", "purge"]


def test_a_disk_recovered_meanwhile_is_not_purged(backend: Backend, disk: Disk) -> None:
    deleted = backend.soft_deletion.delete("web")
    backend.soft_deletion.recover("web")
    with pytest.raises(DiskStateError, match="disk 'web' is ready"):
        backend.erasure.erase(deleted)
    backend.soft_deletion.delete("web")
    let_pass(backend, disk, 8)
    execute(backend.host.config.store_url, "UPDATE disks SET deleted = scheduled_purge")
    with pytest.raises(DiskStateError, match="disk 'web' is deleted"):
        backend.erasure.erase(deleted)
    assert backend.soft_deletion.recover("web") == disk
    backend.disks.check("web")


def test_disks_are_purged_once_their_retention_is_over(
    backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "virt_sse.agent")
    made = {
        name: backend.disks.create(NewDisk(name=name, size=M)) for name in ("bad", "kept", "lost", "old", "x")
    }
    for name in ("bad", "kept", "lost", "old"):
        backend.soft_deletion.delete(name)
    let_pass(backend, made["kept"], 6)
    for name in ("bad", "lost", "old"):
        let_pass(backend, made[name], 7)
    made["bad"].path.write_bytes(b"another file")
    made["lost"].path.unlink()
    (backend.host.config.image_states / str(made["lost"].id)).unlink()  # as of a disk of another host
    metrics = Metrics()
    watch = PurgeWatch(backend.soft_deletion, metrics, 60)
    for _ in range(2):
        watch._work()
    assert [record.getMessage() for record in caplog.records] == ["disk-purged", "purge-failed"]
    assert [each.name for each in backend.host.store.all()] == ["bad", "kept", "lost", "x"]
    assert made["bad"].path.read_bytes() == b"another file"
    assert backend.certificates.get("old").statement.image == "erased"
    rendered = metrics.render().decode()
    assert "virt_sse_agent_deleted_disks 3.0" in rendered
    assert "virt_sse_agent_overdue_purges 1.0" in rendered


def test_without_retention_a_disk_is_deleted_for_good(backend: Backend, disk: Disk, root: Path) -> None:
    path = root / "etc/virt-sse/config.toml"
    path.write_text("[disks]\nretention-days = 0\n")
    with Backend.open(root) as without:
        assert without.soft_deletion.delete("web").scheduled_purge is None
    assert backend.host.store.all() == []
    assert not disk.path.exists()


def test_a_lost_or_exchanged_image_is_seen_at_deletion_and_at_recovery(backend: Backend, disk: Disk) -> None:
    other = backend.disks.create(NewDisk(name="other", size=M))
    away = disk.path.rename(disk.path.with_suffix(".away"))
    disk.path.write_bytes(other.path.read_bytes())
    with pytest.raises(ImageError, match="is not the image of disk 'web' any more"):
        backend.soft_deletion.delete("web")
    away.rename(disk.path)
    backend.soft_deletion.delete("web")
    disk.path.rename(away)
    with pytest.raises(ImageError, match="disk 'web' cannot be recovered") as caught:
        backend.soft_deletion.recover("web")
    assert caught.value.hint
    assert "virt-sse disk purge web" in caught.value.hint
    adopted = backend.disks.adopt(away)  # a moved image
    assert (adopted.path, adopted.state) == (away, DiskState.DELETED)
    backend.soft_deletion.recover("web")
    backend.disks.check("web")
    away.unlink()
    assert backend.soft_deletion.delete("web").scheduled_purge is None
    assert [each.name for each in backend.host.store.all()] == ["other"]


def test_deleted_disks_have_a_list_of_their_own(
    backend: Backend, disk: Disk, virt_sse: CommandLine, root: Path
) -> None:
    backend.disks.create(NewDisk(name="db", size=M))
    backend.soft_deletion.delete("web")
    assert [each["name"] for each in json.loads(virt_sse("disk", "list", "-o", "json"))] == ["db"]
    (listed,) = json.loads(virt_sse("disk", "list", "--deleted", "-o", "json"))
    shown = json.loads(virt_sse("disk", "show", "web", "-o", "json"))
    for fields in (listed, shown):
        assert (fields["name"], fields["state"]) == ("web", "deleted")
        assert datetime.fromisoformat(fields["scheduled-purge"]) == (
            datetime.fromisoformat(fields["deleted"]) + 7 * DAY
        )
    assert "SCHEDULED-PURGE" in virt_sse("disk", "list", "--deleted")
    assert json.loads(virt_sse("disk", "recover", "web", "-o", "json"))["state"] == "ready"
    said = virt_sse.refuses("disk", "delete", "web", "--certificate", root / "file", status=2)
    assert "pass --purge" in said
    backend.soft_deletion.delete("web")
    let_pass(backend, disk, 8)
    assert "would erase disk web" in virt_sse("disk", "purge", "--due", "--dry-run")
    assert virt_sse("disk", "purge", "--due").startswith("erased disk web")
    assert "erased" in virt_sse("certificate", "show", "web")

from __future__ import annotations

import dataclasses
import json
import uuid
from pathlib import Path

import pytest

from support.images import mode
from virt_sse.config import Config
from virt_sse.errors import StageError
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import HostCache, HostCaching, Stage, StorageNode
from virt_sse.stages import Stages
from virt_sse.stages.record import RecordedBase, StageRecord

RECORD = StageRecord(
    disk_id=uuid.UUID(int=1),
    domain_id=uuid.UUID(int=2),
    domain="web",
    image=Path("/var/lib/libvirt/images/Bild, groß.qcow2"),
    format=DiskFormat.QCOW2,
    owner=User(0, 0),
    qemu=User(64055, 108),
    storage=User(990, 990),
    guest_slot="service",
    stages=(HostCache(HostCaching.READ_ONLY), StorageNode("infrastructure")),
    users={"cache": User(991, 990), "storage": User(990, 990)},
)
WRITTEN = {
    "disk": "00000000-0000-0000-0000-000000000001",
    "domain-id": "00000000-0000-0000-0000-000000000002",
    "domain": "web",
    "image": "/var/lib/libvirt/images/Bild, groß.qcow2",
    "format": "qcow2",
    "owner": [0, 0],
    "qemu": [64055, 108],
    "storage": [990, 990],
    "caching": "ReadOnly",
    "guest-slot": "service",
    "storage-slot": "infrastructure",
    "users": {"cache": [991, 990], "storage": [990, 990]},
}
"""As written by earlier versions, with the cache above the daemon; running domains have such records."""

JSON_VALUES = (
    *(None, True, 1, -1, 1.5, "text", {}, {"a": 1}),
    *([], [1], [1, 2, 3], ["0", 0], [0, True], [0, None], [0, 2**32], [-1, 0]),
)
VALID = {
    ("domain", "text"),
    ("image", "text"),
    ("guest-slot", "text"),
    ("guest-slot", None),
    ("storage-slot", "text"),
    ("storage-slot", None),
    ("users", "{}"),
}


def below(caching: str, slot: str | None) -> tuple[Stage, ...]:
    caches = () if caching == "None" else (HostCache(HostCaching(caching)),)
    return (*caches, *([StorageNode(slot)] if slot else []))


@pytest.mark.parametrize("slot", ["infrastructure", None])
@pytest.mark.parametrize("caching", ["None", "ReadOnly", "ReadWrite"])
def test_a_record_is_read_as_written(tmp_path: Path, slot: str | None, caching: str) -> None:
    record = dataclasses.replace(RECORD, stages=below(caching, slot))
    folder = tmp_path / "stages" / str(record.disk_id)
    record.write(folder)
    assert StageRecord.read(folder) == record
    assert {path.name: mode(path) for path in folder.iterdir()} == {"stages.json": 0o600}
    assert mode(folder) == mode(folder.parent) == 0o700
    written = json.loads((folder / "stages.json").read_bytes())
    names = [*(["cache"] if caching != "None" else []), *(["storage"] if slot else [])]
    assert written == WRITTEN | {"gated": True, "caching": caching, "storage-slot": slot, "order": names}
    (folder / "stages.json").write_text(json.dumps(WRITTEN | {"caching": caching, "storage-slot": slot}))
    assert StageRecord.read(folder) == dataclasses.replace(record, gated=False)


def test_a_record_keeps_the_order_of_the_stages(tmp_path: Path) -> None:
    record = dataclasses.replace(RECORD, stages=RECORD.stages[::-1])
    record.write(tmp_path)
    assert StageRecord.read(tmp_path) == record
    assert record != RECORD


@pytest.mark.parametrize("order", [["cache", "cache"], ["cache", "disk"], ["storage", "storage", "cache"]])
def test_an_order_of_other_processes_is_refused(tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "stages.json").write_text(json.dumps(WRITTEN | {"order": order}))
    with pytest.raises(StageError, match=r"damaged stage record .*order"):
        StageRecord.read(tmp_path)


def test_the_record_of_a_linked_clone_has_the_image_below(tmp_path: Path) -> None:
    base = RecordedBase(uuid.UUID(int=5), Path("/images/debian:1.qcow2"), User(0, 0))
    record = dataclasses.replace(RECORD, base=base)
    record.write(tmp_path)
    assert StageRecord.read(tmp_path) == record
    path = tmp_path / "stages.json"
    written = json.loads(path.read_bytes())
    assert written["base"] == [str(base.disk_id), "/images/debian:1.qcow2", 0, 0]
    for wrong in ("x", [], written["base"][:3], ["x", *written["base"][1:]], [*written["base"][:3], -1]):
        path.write_text(json.dumps(written | {"base": wrong}))
        with pytest.raises(StageError, match=f"{path}.*base"):
            StageRecord.read(tmp_path)


def test_a_record_from_before_each_process_had_a_user_is_read(tmp_path: Path) -> None:
    before = {name: value for name, value in WRITTEN.items() if name != "users"}
    (tmp_path / "stages.json").write_text(json.dumps(before))
    record = StageRecord.read(tmp_path)
    assert record == dataclasses.replace(RECORD, users={}, gated=False)
    assert record
    assert record.user("cache") == record.user("storage") == User(990, 990)
    assert record.user_ids == {990}


def test_an_invalid_record_is_refused(tmp_path: Path) -> None:
    assert StageRecord.read(tmp_path) is None
    RECORD.write(tmp_path)
    path = tmp_path / "stages.json"
    written = json.loads(path.read_bytes())
    assert written == WRITTEN | {"gated": True, "order": ["cache", "storage"]}
    for content in (
        b"",
        b"\xff",
        b"[]",
        b'{"disk": 1}',
        *(json.dumps(written | {name: wrong}).encode() for name, wrong in (("disk", "x"), ("owner", [0]))),
        json.dumps(written | {"caching": "Sometimes"}).encode(),
        json.dumps(written | {"unknown": 1}).encode(),
        *(
            json.dumps({key: value for key, value in written.items() if key != name}).encode()
            for name in WRITTEN.keys() - {"users"}
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(StageError, match=f"^damaged stage record {path}: "):
            StageRecord.read(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(StageError, match="cannot read"):
        StageRecord.read(tmp_path)


@pytest.mark.parametrize("value", JSON_VALUES, ids=json.dumps)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_mistyped_field_is_named_and_stops_its_own_disk_only(
    tmp_path: Path, name: str, value: object
) -> None:
    config = Config.load(tmp_path)
    stages = Stages(config)
    other = dataclasses.replace(RECORD, disk_id=uuid.UUID(int=3))
    other.write(config.stage_directory / str(other.disk_id))
    folder = config.stage_directory / str(RECORD.disk_id)
    folder.mkdir()
    (folder / "stages.json").write_text(json.dumps(WRITTEN | {name: value}))
    damaged: list[StageError] = []
    if (name, value if isinstance(value, str | None) else json.dumps(value)) in VALID:
        assert len(stages.records(damaged.append)) == 2
        assert damaged == []
        return
    with pytest.raises(StageError, match=f"{folder}.*{name}") as failure:
        stages.record(RECORD.disk_id)
    assert "remove it if no running domain" in str(failure.value.hint)
    for domain_id in (None, RECORD.domain_id):
        with pytest.raises(StageError, match=name):
            stages.stop(RECORD.disk_id, domain_id=domain_id)
    assert stages.records(damaged.append) == [other]
    assert [str(each) for each in damaged] == [str(failure.value)]
    stages.stop_domain(other.domain_id)
    assert stages.records() == []
    assert [path.name for path in folder.iterdir()] == ["stages.json"]


@pytest.mark.parametrize(
    ("image_format", "slot", "caching", "kept"),
    [
        ("raw", "infrastructure", "None", True),
        ("qcow2", "infrastructure", "None", False),
        ("raw", "infrastructure", "ReadOnly", True),
        ("qcow2", "infrastructure", "ReadOnly", False),
        ("raw", None, "ReadOnly", True),
        ("qcow2", None, "ReadOnly", True),
        ("raw", "infrastructure", "ReadWrite", False),
        ("raw", None, "ReadWrite", False),
        ("qcow2", None, "ReadWrite", False),
    ],
)
def test_only_durable_stages_keep_acknowledged_writes(
    tmp_path: Path, image_format: str, slot: str | None, caching: str, kept: bool
) -> None:
    record = dataclasses.replace(RECORD, format=DiskFormat(image_format), stages=below(caching, slot))
    assert Stages(Config.load(tmp_path)).may_restart(record) is kept


@pytest.mark.parametrize(
    "content",
    [
        "9" * 5000,
        "[" * 100_000,
        '{"domain": "\\ud800"}',
        '{"owner": [' + "9" * 400 + ", 1]}",
        '{"owner": [1e999, 1]}',
    ],
)
def test_a_record_with_impossible_values_is_damaged(tmp_path: Path, content: str) -> None:
    (tmp_path / "stages.json").write_text(content)
    with pytest.raises(StageError, match="damaged stage record"):
        StageRecord.read(tmp_path)

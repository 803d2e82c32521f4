from __future__ import annotations

import dataclasses
import json
import uuid
from pathlib import Path

import pytest

from support.images import mode
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import HostCaching
from virt_sse.stages.record import StageRecord

RECORD = StageRecord(
    disk_id=uuid.UUID(int=1),
    domain_id=uuid.UUID(int=2),
    domain="web",
    image=Path("/var/lib/libvirt/images/Bild, groß.qcow2"),
    format=DiskFormat.QCOW2,
    owner=User(0, 0),
    qemu=User(64055, 108),
    storage=User(990, 990),
    caching=HostCaching.READ_ONLY,
    guest_slot="service",
    storage_slot="infrastructure",
)


@pytest.mark.parametrize("slot", ["infrastructure", None])
def test_a_record_is_read_as_written(tmp_path: Path, slot: str | None) -> None:
    record = dataclasses.replace(RECORD, storage_slot=slot)
    folder = tmp_path / "stages" / str(record.disk_id)
    record.write(folder)
    assert StageRecord.read(folder) == record
    assert {path.name: mode(path) for path in folder.iterdir()} == {"stages.json": 0o600}
    assert mode(folder) == mode(folder.parent) == 0o700


def test_an_invalid_record_is_refused(tmp_path: Path) -> None:
    assert StageRecord.read(tmp_path) is None
    RECORD.write(tmp_path)
    path = tmp_path / "stages.json"
    written = json.loads(path.read_bytes())
    for content in (
        b"",
        b"\xff",
        b"[]",
        b'{"disk": 1}',
        *(json.dumps(written | {name: wrong}).encode() for name, wrong in (("disk", "x"), ("owner", [0]))),
        json.dumps(written | {"caching": "Sometimes"}).encode(),
        *(
            json.dumps({key: value for key, value in written.items() if key != name}).encode()
            for name in written
        ),
    ):
        path.write_bytes(content)
        assert StageRecord.read(tmp_path) is None, content


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
    image_format: str, slot: str | None, caching: str, kept: bool
) -> None:
    record = dataclasses.replace(
        RECORD, format=DiskFormat(image_format), storage_slot=slot, caching=HostCaching(caching)
    )
    assert record.keeps_all is kept

"""Damaged and unused records of stage processes: reported, or ended, and the agent keeps all other disks."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import cast
from unittest.mock import Mock
from uuid import UUID

import pytest

from virt_sse.agent.inventory import InventorySnapshot
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.stage_watch import StageWatch
from virt_sse.config import Config
from virt_sse.domains.start import DomainStart
from virt_sse.libvirt.users import ROOT
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import StorageNode
from virt_sse.stages import Stages
from virt_sse.stages.record import StageRecord

UNUSED = StageRecord(
    disk_id=UUID(int=2),
    domain_id=UUID(int=3),
    domain="web",
    image=Path("/missing"),
    format=DiskFormat.RAW,
    owner=ROOT,
    qemu=ROOT,
    storage=ROOT,
    guest_slot="service",
    stages=(StorageNode("infrastructure"),),
)


def test_it_is_reported_once_and_an_unused_disk_beside_it_is_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config.load(tmp_path)
    damaged = UUID(int=1)
    (config.stage_directory / str(damaged)).mkdir(parents=True)
    (config.stage_directory / str(damaged) / "stages.json").write_text("[]")
    UNUSED.write(config.stage_directory / str(UNUSED.disk_id))
    watch = StageWatch("test:///", Stages(config), cast(DomainStart, Mock()), Metrics(), unused_seconds=0)
    with caplog.at_level(logging.INFO, "virt_sse"):
        watch.keep(InventorySnapshot(1))
        watch.keep(InventorySnapshot(1))
        watch._pool.shutdown()
    assert sorted(caplog.messages) == ["stage-ended", "stage-record-damaged"]
    assert [path.name for path in config.stage_directory.iterdir()] == [str(damaged)]


def test_stages_of_a_domain_that_starts_again_stay(tmp_path: Path) -> None:
    """The agent may see neither the end between two runs of a domain, nor the second run in time."""
    stages, folder = Stages(Config.load(tmp_path)), Config.load(tmp_path).stage_directory
    record = folder / str(UNUSED.disk_id)
    watch = StageWatch("test:///", stages, cast(DomainStart, Mock()), Metrics(), unused_seconds=0.3)
    UNUSED.write(record)
    watch.keep(InventorySnapshot(1))
    time.sleep(0.4)
    UNUSED.write(record)
    watch.keep(InventorySnapshot(2))
    watch._pool.shutdown()
    assert record.exists()
    assert not stages.stop(UNUSED.disk_id, spared_seconds=60)
    assert stages.stop(UNUSED.disk_id)
    assert not record.exists()

"""Records of overlay commits: written, read, and damaged."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import msgspec
import pytest

from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.overlay_commit_record import Overlay, OverlayCommitRecord, record_path
from virt_sse.agent.plaintext_watch import PlaintextWatch
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.config.file import PlaintextPolicy
from virt_sse.errors import AgentError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.stages import Stages

DOMAIN, DISK = UUID(int=2), UUID(int=1)
RECORD = OverlayCommitRecord(DOMAIN, "web", "vda", DISK, "token", (Overlay(Path("/overlay"), (1, 2)),))
WRITTEN: dict[str, Any] = {
    "domain-id": str(DOMAIN),
    "domain": "web",
    "target": "vda",
    "disk": str(DISK),
    "token": "token",
    "overlays": [{"path": "/overlay", "device": 1, "inode": 2}],
    "committed": False,
}
"""The record as version 0.1 has written it."""

JSON_VALUES = (None, True, 1, -1, 1.5, "text", [], [1], [None], {}, {"a": 1})
VALID = {("domain", "text"), ("target", "text"), ("token", "text"), ("path", "text")}
VALID_HERE = [("overlays", "[]"), ("committed", "true"), *((name, "1") for name in ("device", "inode"))]
XML = f"""\
<domain><devices><disk type='file'><source file='/overlay'/>
<backingStore type='file'><source file='/ours'><encryption format='luks'>
<secret type='passphrase' usage='{SecretName(DISK, "service").usage}'/></encryption></source>
<backingStore/></backingStore><target dev='vda'/><alias name='virtio-disk0'/></disk></devices></domain>"""


def test_the_format_is_as_before(tmp_path: Path) -> None:
    RECORD.write(tmp_path)
    path = record_path(tmp_path, DOMAIN, "vda")
    assert json.loads(path.read_bytes()) == WRITTEN
    path.write_text(json.dumps(WRITTEN | {"committed": True}))
    assert OverlayCommitRecord.read_all(tmp_path) == [dataclasses.replace(RECORD, is_committed=True)]


@pytest.mark.parametrize("value", JSON_VALUES, ids=json.dumps)
@pytest.mark.parametrize("name", [*WRITTEN, *WRITTEN["overlays"][0]])
def test_a_mistyped_field_is_named_and_stops_its_own_disk_only(
    tmp_path: Path, name: str, value: object
) -> None:
    RECORD.write(tmp_path)
    other = dataclasses.replace(RECORD, target="vdb")
    other.write(tmp_path)
    path = record_path(tmp_path, DOMAIN, "vda")
    overlay = WRITTEN["overlays"][0]
    changed = {name: value} if name in WRITTEN else {"overlays": [overlay | {name: value}]}
    path.write_text(json.dumps(WRITTEN | changed))
    damaged: dict[Path, AgentError] = {}
    found = OverlayCommitRecord.read_all(tmp_path, damaged.__setitem__)
    assert other in found
    is_valid = (name, value) in VALID if isinstance(value, str) else False
    if is_valid or (name, json.dumps(value)) in VALID_HERE:
        assert (len(found), damaged) == (2, {})
        return
    assert found == [other]
    assert list(damaged) == [path]
    assert str(damaged[path]).startswith(f"damaged overlay commit record {path}: ")
    assert name in str(damaged[path])


def test_a_damaged_record_is_reported_once_and_no_new_commit_replaces_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config.load(tmp_path)
    config = dataclasses.replace(
        config, agent=msgspec.structs.replace(config.agent, plaintext=PlaintextPolicy.COMMIT)
    )
    folder = config.state_directory / "folds"
    RECORD.write(folder)
    path = record_path(folder, DOMAIN, "vda")
    path.write_text("{}")
    watch = PlaintextWatch(
        cast(Backend, SimpleNamespace(host=SimpleNamespace(config=config, stages=Stages(config)))), Metrics()
    )
    domain = RunningDomain(DOMAIN, 1, "web", (), True, False, frozenset(), DomainDefinition.parse(XML))
    try:
        with caplog.at_level(logging.INFO, "virt_sse"):
            for number in (1, 2):
                watch.keep(InventorySnapshot(number, (domain,)), [])
    finally:
        watch.stop()
    assert caplog.messages == ["plaintext-link", "fold-record-damaged"]
    assert path.read_text() == "{}"

"""What the agent collects for the page, from a real store and audit log; no libvirt answers."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from support import images
from support.audit_logs import make, open_log
from virt_sse.agent.revocation import PLATFORM_ACTION
from virt_sse.backend import Backend
from virt_sse.model.disks import NewDisk
from virt_sse.model.keys import Dek
from virt_sse.page.document import encode
from virt_sse.page.overview import AgentView, KeyUses, OverviewCollector

M = 1 << 20


def status() -> dict[str, Any]:
    return {
        "version": "1",
        "began": "2026-11-27T12:00:00+00:00",
        "libvirt": "test",
        "libvirt-connected": False,
        "last-look": None,
        "poll-seconds": 2.0,
        "domains": [],
        "keys": [
            {
                "key": "customer-managed:https://v.example/keys/k:abc",
                "encryption-set": None,
                "state": "enabled",
            }
        ],
    }


def collector(backend: Backend) -> OverviewCollector:
    view = AgentView(status, backend.domains.plan, lambda _disks: (PLATFORM_ACTION.value, 60))
    return OverviewCollector(backend.host, view)


def test_the_document_has_disks_keys_and_uses_and_no_key_material(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    images.require("qemu-img", "cryptsetup")
    material = b"M4t3r1al-of-a-DEK-in-32-bytes-!!"
    monkeypatch.setattr(Dek, "generate", lambda: Dek(material))
    made = backend.disks.create(NewDisk(name="web", size=M))
    collecting = collector(backend)
    document = collecting.collect()
    (disk,) = document.disks
    assert (disk.name, disk.size, [layer.process for layer in disk.layers]) == ("web", M, ["guest"])
    assert disk.layers[0].key == "platform-managed:default"
    assert [(use.action, use.result) for use in document.uses] == [("wrap", "allowed")]
    assert document.last_uses == document.uses
    assert [(each.key, each.version) for each in document.key_states] == [
        ("customer-managed:https://v.example/keys/k", "abc")
    ]
    assert "libvirt" in [fault.part for fault in document.faults]
    content = encode(document)
    entry = made.deks[0]
    assert material not in content
    assert Dek(material).passphrase not in content
    assert entry.wrapped.ciphertext not in content
    assert entry.wrapped.ciphertext.hex().encode() not in content


def test_a_store_that_is_gone_is_a_fault(backend: Backend) -> None:
    collecting = collector(backend)
    path = Path(backend.host.config.store_url.removeprefix("sqlite:///"))
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE wrapped_deks")
    document = collecting.collect()
    assert document.disks == ()
    assert "store" in [fault.part for fault in document.faults]


def test_key_uses_are_read_once_and_another_log_is_noticed(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    uses = KeyUses(log)
    uses.update()
    assert (uses.records_read, uses.tail()) == (0, ())
    for number in range(7):
        log.append(make(number))
    uses.update()
    uses.update()
    assert (uses.records_read, [use.seq for use in uses.tail()]) == (7, [1, 2, 3, 4, 5, 6, 7])
    log.append(make(7))
    uses.update()
    assert uses.records_read == 8
    assert [use.seq for use in uses.last()] == [8]
    for path in (*log.files(), *(tmp_path / "log").glob("*.head"), *(tmp_path / "state").iterdir()):
        path.unlink()
    log.append(make())
    uses.update()
    assert [use.seq for use in uses.tail()] == [1]

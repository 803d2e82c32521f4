"""What ``vm verify`` finds in a storage daemon of a linked clone."""

from __future__ import annotations

import dataclasses
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest

from support import images
from support.clone_images import CIPHERS, CONTENT, M, daemon, filled, make
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import KeyId, WrappedDek
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.verification.graph import BlockGraph
from virt_sse.verification.stage_evidence import _check_base
from virt_sse.verification.verdict import DiskVerdict


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-storage-daemon", "qemu-img", "cryptsetup")


def image_of(base: BaseImage) -> Disk:
    """The image below as stored."""
    unwrapped = WrappedDek(b"", "none", KeyId("none", "none", "1"))
    return Disk(
        id=base.disk_id,
        name="debian:1",
        path=base.path,
        format=base.format,
        size=len(CONTENT),
        state=DiskState.READY,
        encryption_type=EncryptionType.PLATFORM_AND_CUSTOMER_KEYS,
        created=datetime.now(UTC),
        generation=1,
        deks=tuple(DekEntry(f"slot{number}", CIPHERS[number], unwrapped) for number in range(len(base.deks))),
        kind=DiskKind.IMAGE,
    )


def test_the_image_below_is_found_once_read_only_and_with_all_of_its_layers(tmp_path: Path) -> None:
    base = filled(tmp_path, "raw", double=True)
    image = image_of(base)
    clone = make(tmp_path / "clone", "qcow2", double=False, size=2 * M)

    def problems(opened: BaseImage | None, expected: Disk, *, read_only: bool = True) -> str:
        with daemon(clone, opened) as (monitor, _):
            nodes, edges, exports = monitor.block_graph()
        if not read_only:
            nodes = [{**node, "ro": False} for node in nodes]
        verdict = DiskVerdict("vda")
        _check_base(verdict, expected, "daemon", BlockGraph(nodes, edges, exports=exports), nodes)
        return "; ".join(verdict.problems)

    assert problems(base, image) == ""
    assert re.search("in no file.*does not have the image 'debian:1' alone", problems(None, image))
    other = dataclasses.replace(image, path=tmp_path / "other")
    assert f"has the image below in {base.path}" in problems(base, other)
    single = dataclasses.replace(image, deks=image.deks[:1])
    assert "decrypts the image below with ['aes-256-xts', 'aes-256-cbc-essiv" in problems(base, single)
    assert "can write to the image below: " in problems(base, image, read_only=False)

"""A whole life of a disk under a Linux guest that writes with checksums all the time.

``VIRT_SSE_LIFE_KILLS=5`` adds five lives with a kill in each step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from soak.disk_life import KilledLife
from support.agent_site import CustomerSite, customer_site
from support.disk_life import DiskLife
from support.stage_site import StageSite
from support.writing_guest import CANARY, WritingGuest
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.lab.vaults import LabVault

SEEDS = range(1, 1 + int(os.environ.get("VIRT_SSE_LIFE_KILLS", "0")))
Accelerate = Callable[[str], Acceleration]


@pytest.mark.slow
def test_a_disk_lives_from_plaintext_to_a_backup_on_another_host(
    site: CustomerSite,
    second_lab_host: LabHost,
    lab_vault: LabVault,
    acceleration: Accelerate,
    linux_micro: LinuxMicro,
) -> None:
    linux = acceleration("linux-micro")
    life = DiskLife(site, linux, linux_micro)
    life.guest.run()
    life.guest.await_writes()
    for step in life.steps():
        step.prepare()
        said = life.stages.virt_sse(*step.arguments)
        assert step.is_done(), said
        life.stages.virt_sse("vm", "verify", life.name)
        life.guest.await_writes()
    assert plaintext_in(site.host.directory) == [life.plain]

    second = life.writing_guest(life.second, site.backend.domains.disk_element(life.second))
    second.define()
    assert 0 <= second.run() <= life.guest.acknowledged
    second.destroy()
    life.guest.destroy()
    assert life.guest.run() > second.acknowledged

    point = life.points()[-1]
    with customer_site(second_lab_host, lab_vault, linux) as other:
        restored = restore_elsewhere(other, life, point.path)
        there = WritingGuest(second_lab_host, "there", disk=restored, acceleration=linux, boot=linux_micro)
        there.define()
        assert second.acknowledged < there.run() <= life.guest.acknowledged
        there.destroy()
        there.undefine()
        assert plaintext_in(second_lab_host.directory) == []
    life.guest.check()
    life.stages.virt_sse("vm", "encrypt", life.name, "--wipe")
    assert plaintext_in(site.host.directory) == []
    second.undefine()
    life.end()


def plaintext_in(folder: Path) -> list[Path]:
    """The files that hold what the guest has written."""
    return [
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink() and CANARY in path.read_bytes()
    ]


def restore_elsewhere(other: CustomerSite, life: DiskLife, point: Path) -> str:
    """Restore a backup on another host, which has the vault and the backup alone: the new disk's element."""
    folder = other.host.directory / "bäckup, 1:2"
    shutil.copytree(point.parent, folder)
    made = other.backend.sets.create("there", provider="customer-managed", key=life.customer.key.name)
    other.grant(made)
    stages = StageSite(other.host, other.backend, other._acceleration)
    place = other.host.images / "there.raw"
    arguments = ("--des", "there", "--trust", "--format", "raw", "--path", place)
    stages.virt_sse("disk", "restore", folder / point.name, "there", *arguments)
    return other.backend.domains.disk_element("there")


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_kills_in_each_step_lose_nothing(
    site: CustomerSite, acceleration: Accelerate, linux_micro: LinuxMicro, seed: int
) -> None:
    KilledLife(site, acceleration("linux-micro"), linux_micro, seed).play()

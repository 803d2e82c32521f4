"""Copies of a disk whose file systems QEMU's guest agent freezes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.disk_contents import decrypted
from support.stage_site import StageSite, stage_site_fixtures
from support.waiting import wait_until
from virt_sse.lab import recipes
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import AGENT_CHANNEL, Guest

running_site, site = stage_site_fixtures()

_SCRIPT = """\
set -e
mke2fs -q /dev/vda; mount -t ext2 /dev/vda /mnt
echo 0 >/proc/sys/vm/dirty_writeback_centisecs
echo 360000 >/proc/sys/vm/dirty_expire_centisecs
qemu-ga -d -m virtio-serial -p /dev/vport*p1 -t /tmp -f /tmp/pid
yes "$(echo first | md5sum)" | head -c 4096 >/mnt/file; echo written
while :; do sleep 1; done
"""
_IN_THE_FILE = hashlib.md5(b"first\n", usedforsecurity=False).hexdigest().encode()
_DIE_WHILE_FROZEN = """\
import os
from virt_sse.domains import live_copies
live_copies._are_in_sync = lambda *_: os._exit(9)
from virt_sse.cli.main import main
main()
"""


@pytest.mark.slow
def test_a_snapshot_freezes_the_guests_file_systems_and_a_kill_leaves_none_frozen(
    site: StageSite, acceleration: Callable[[str], Acceleration], linux_micro: object, tmp_path: Path
) -> None:
    boot = recipes.linux_micro_with_agent(tmp_path)
    disk = site.single_disk(size=4 << 20)
    guest = Guest(
        site.host,
        f"{disk.name}-agent",
        acceleration=acceleration("linux-micro"),
        disks=[site.backend.domains.disk_element(disk.name)],
        boot=boot,
        devices=[AGENT_CHANNEL],
    )
    guest.start(_SCRIPT)
    guest.wait_for("written")

    def frozen() -> str:
        answer = site.virsh("qemu-agent-command", guest.name, '{"execute": "guest-fsfreeze-status"}')
        status: str = json.loads(answer)["return"]
        return status

    wait_until(lambda: "state='connected'" in site.virsh("dumpxml", guest.name), "the agent is connected")
    for option, is_there in (("--no-quiesce", False), ("--quiesce", True)):
        site.virt_sse("snapshot", "create", "s", "--disk", disk.name, option)
        content = decrypted(site.backend, site.backend.disks.get("s"))
        assert (_IN_THE_FILE in content) == is_there, "a freeze writes what the guest has not written yet"
        site.backend.snapshots.delete("s")
        assert frozen() == "thawed"
    killed = site.popen(
        sys.executable,
        "-c",
        _DIE_WHILE_FROZEN,
        "snapshot",
        "create",
        "never",
        "--disk",
        disk.name,
        "--quiesce",
    )
    said, _ = killed.communicate(timeout=60)
    assert killed.returncode == 9, said
    assert site.virsh("domstate", guest.name).strip() == "paused"
    site.virt_sse("disk", "list")
    assert site.virsh("domstate", guest.name).strip() == "running"
    assert frozen() == "thawed"

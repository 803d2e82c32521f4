"""The start of an agent after kills, while libvirt waits for a hook."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.stage_site import StageSite, stage_site
from support.waiting import is_gone, wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest, disk_xml
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image

_HOOK = """\
#!/bin/sh
[ "$2" = release ] || exit 0
: >{folder}/waits
while [ ! -e {folder}/goes-on ]; do sleep 0.05; done
"""


@pytest.fixture
def site(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[StageSite]:
    with stage_site(lab_host, acceleration("boot-sector")) as site:
        yield site
        site.forget_domains()


@contextlib.contextmanager
def slow_release(site: StageSite) -> Iterator[Path]:
    """A hook before ours that keeps libvirt in the event ``release``: the folder with its signals."""
    folder = site.host.directory / "release"
    folder.mkdir()
    hook = site.host.root / "etc/libvirt/hooks/qemu.d/00-slow"
    hook.write_text(_HOOK.format(folder=folder))
    hook.chmod(0o755)
    try:
        yield folder
    finally:
        (folder / "goes-on").touch()
        hook.unlink()


def disks(site: StageSite) -> set[str]:
    """All disks of the host, those of other tests included."""
    return {disk.name for disk in site.backend.host.store.all()}


def test_an_agent_with_a_copy_to_undo_starts_while_libvirt_waits_for_a_hook(site: StageSite) -> None:
    """The hook waits for the agent's socket: an agent that waited for libvirt first would hang both."""
    plain = site.host.images / "plain.raw"
    with plain.open("wb") as file:
        file.write(boot_sector_image(stays=True).read_bytes())
        file.truncate(64 << 20)
    guest = Guest(site.host, "hung", acceleration=site.acceleration, disks=[disk_xml(plain)])
    guest.start()
    before = disks(site)
    command = site.popen("virt-sse", "vm", "encrypt", guest.name, "--max-rate", "1M")
    wait_until(lambda: "<mirror" in site.virsh("dumpxml", guest.name), "QEMU copies the disk")
    with slow_release(site) as folder:
        for process in site.processes():
            if "encrypt" in process.command:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
        command.communicate(timeout=60)
        qemu = site.qemu(guest).pid
        os.kill(qemu, signal.SIGKILL)
        wait_until(lambda: is_gone(qemu), "QEMU has ended")
        wait_until((folder / "waits").exists, "libvirt waits for the hook")
        with LabAgent(site.host):
            (folder / "goes-on").touch()
            wait_until(lambda: not guest.is_active(), "libvirt knows of the end of QEMU")
            wait_until(lambda: disks(site) == before, "the agent has undone the copy", seconds=60)
    assert site.secrets() == []
    assert [path.name for path in site.host.images.iterdir() if "hung" in path.name] == []
    plain.unlink()

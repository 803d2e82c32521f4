"""``virt-sse host doctor`` and ``host uninstall`` on a host with libvirt, from its set-up to the removal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.command_line import PROGRAM
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration, GuestName
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image

pytestmark = [pytest.mark.usefixtures("as_root"), pytest.mark.libvirt]


@pytest.fixture
def host(boot_sector: Path) -> Iterator[LabHost]:
    """A host of the test's own, without a hook; the recipe's tools are there."""
    with LabHost() as host:
        yield host


def test_a_host_from_its_first_start_to_the_removal(
    host: LabHost, acceleration: Callable[[GuestName], Acceleration]
) -> None:
    def virt_sse(*arguments: str | Path, status: int = 0) -> str:
        done = host.run([PROGRAM, *arguments])
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    def faults(status: int) -> set[str]:
        return {each["id"] for each in json.loads(virt_sse("host", "doctor", "-o", "json", status=status))}

    virt_sse("host", "init")
    assert faults(1) == {"hook-unseen", "agent-not-running"}
    host.restart_libvirtd()
    assert faults(3) == {"agent-not-running"}

    double = "EncryptionAtRestWithPlatformAndCustomerKeys"
    provider = ("--provider", "platform-managed", "--key", "default")
    virt_sse("des", "create", "double", *provider, "--encryption-type", double)
    folder = host.directory / "disks"  # the host's own folder of images belongs to QEMU's user
    folder.mkdir(mode=0o711)
    image = folder / "boot.qcow2"
    source = boot_sector_image(stays=True)
    virt_sse("disk", "import", "boot", source, "--source-format", "raw", "--path", image, "--des", "double")
    element = virt_sse("disk", "xml", "boot")
    guest = Guest(host, "boot", acceleration=acceleration("boot-sector"), disks=[element])
    guest.start()
    guest.wait_for("verified 8 sectors, ok")
    assert "domains with disks of virt-sse run: boot" in virt_sse("host", "uninstall", status=1)

    hook = host.directory / "etc/libvirt/hooks/qemu.d/virt-sse"
    hook.unlink()
    guest.destroy()
    assert faults(1) == {"hook-missing", "agent-not-running", "stage-leftover"}

    virt_sse("host", "init")
    with LabAgent(host):
        wait_until(
            lambda: not list((host.root / "run/virt-sse/stages").glob("*/*.json")), "the agent's clean-up"
        )
        assert faults(1) == {"hook-unseen"}
        assert "the agent is running" in virt_sse("host", "uninstall", "--keep-disks", status=1)
    assert "1 disks and copies exist" in virt_sse("host", "uninstall", status=1)
    said = virt_sse("host", "uninstall", "--keep-disks")
    assert f"removed libvirt hook {hook}\n" in said
    assert "kept 1 images of disks and copies" in said
    assert image.exists()
    assert not hook.exists()

"""The agent sees to storage daemons: one that died under a guest, and one that nobody uses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import uuid
from collections.abc import Callable

import libvirt
import pytest

from support.agent_site import Site
from support.waiting import wait_until
from virt_sse.domains.settings import VmChanges
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk
from virt_sse.model.layers import EncryptionType, HostCaching
from virt_sse.stages.locked_process import LockedProcess

WRITE_AND_VERIFY = """\
set -e
mke2fs -q /dev/vda >&-
mount -t ext2 /dev/vda /mnt
cd /mnt
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    seq $i 3000 | tee $i | md5sum >$i.md5; sync; echo "wrote $i"
    sleep 0.1
done
echo 3 >/proc/sys/vm/drop_caches
for sum in *.md5; do
    [ "$(md5sum <${sum%.md5})" = "$(cat $sum)" ] || { echo "$sum is damaged"; exit 1; }
done
echo "all is whole"
sleep 60
"""
VERIFY = """\
set -e
mount -t ext2 /dev/vda /mnt
cd /mnt
i=0
while [ $i -lt {stable} ]; do
    i=$((i + 1)); [ "$(md5sum <$i)" = "$(cat $i.md5)" ] || {{ echo "$i is damaged"; exit 1; }}
done
echo "$i files are whole"
sleep 60
"""
DOUBLE = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS


@pytest.fixture
def double(site: Site) -> str:
    """A set for double encryption, under the platform's key."""
    name = f"double-{uuid.uuid4().hex[:8]}"
    site.backend.sets.create(
        name, key="default", provider="platform-managed", encryption_type=DOUBLE, automatic_rotation=False
    )
    return name


def daemon_of(site: Site, disk_id: uuid.UUID) -> LockedProcess:
    return LockedProcess(site.backend.host.config.stage_directory / str(disk_id) / "storage")


def test_a_dead_stage_is_reported_and_the_guest_gets_no_wrong_data(site: Site, double: str) -> None:
    guest, disk = site.guest(double)
    guest.start()
    guest.wait_for("verified")
    pid = daemon_of(site, disk.id).pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    site.wait_for_event("stage-lost", disk=str(disk.id))
    (event,) = site.events("stage-lost", disk=str(disk.id))
    assert "must be stopped and started" in str(event["reason"])
    assert daemon_of(site, disk.id).pid() is None, "a new one would answer with older data"
    guest.destroy()
    guest.start()
    guest.wait_for("start 2")
    guest.wait_for("verified")


def test_a_stage_that_lost_nothing_is_restarted_under_a_writing_guest(
    site: Site, double: str, acceleration: Callable[[str], Acceleration], linux_micro: LinuxMicro
) -> None:
    """A raw volume: all that it has acknowledged is in the kernel's page cache."""
    disk = site.backend.disks.create(
        NewDisk(name=double, size=16 << 20, format=DiskFormat.RAW, encryption_set=double)
    )
    element = site.backend.domains.disk_element(disk.name)
    linux = acceleration("linux-micro")
    guest = Guest(site.host, disk.name, acceleration=linux, boot=linux_micro, disks=[element])
    guest.start(WRITE_AND_VERIFY)
    guest.wait_for("wrote 5")
    pid = daemon_of(site, disk.id).pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    site.wait_for_event("stage-restarted", disk=str(disk.id))
    guest.wait_for("all is whole")
    assert daemon_of(site, disk.id).pid() not in (pid, None)
    assert not site.events("stage-lost", disk=str(disk.id))
    guest.destroy()


def test_a_write_back_cache_loses_no_flushed_data(
    site: Site, acceleration: Callable[[str], Acceleration], linux_micro: LinuxMicro
) -> None:
    name = f"cached-{uuid.uuid4().hex[:8]}"
    disk = site.backend.disks.create(NewDisk(name=name, size=16 << 20))
    linux, element = acceleration("linux-micro"), site.backend.domains.disk_element(name)
    guest = Guest(site.host, name, acceleration=linux, boot=linux_micro, disks=[element])
    guest.define(WRITE_AND_VERIFY)
    caching = {"vda": HostCaching.READ_WRITE}
    site.backend.vms.update(name, VmChanges(encryption_at_host=True, caching=caching))
    site.host.virsh("start", name)
    guest.wait_for("wrote 5")
    pid = LockedProcess(site.backend.host.config.stage_directory / str(disk.id) / "cache").pid()
    assert pid
    os.kill(pid, signal.SIGKILL)
    site.wait_for_event("stage-lost", disk=str(disk.id))
    wait_until(lambda: "paused" in site.host.virsh("domstate", name).stdout, "the guest is paused")
    stable = max(int(line.split()[1]) for line in guest.serial.splitlines() if line.startswith("wrote "))
    guest.destroy()
    xml = guest.xml(VERIFY.format(stable=stable))
    with site.host.connect() as connection:  # as it was defined, but for what the guest does
        kept = connection.lookupByName(name).XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
        new, old = (re.search("<cmdline>.*</cmdline>", text) for text in (xml, kept))
        assert new
        assert old
        connection.defineXML(kept.replace(old[0], new[0])).create()
    guest.wait_for(f"{stable} files are whole")
    guest.destroy()


def test_a_stage_without_a_domain_is_ended(site: Site, double: str) -> None:
    """The release hook did not run, or could not."""
    guest, disk = site.guest(double)
    guest.start()
    site.wait_until_watched(guest)
    folder = site.backend.host.config.stage_directory / str(disk.id)
    kept = (folder / "stages.json").read_bytes()
    guest.destroy()
    assert not folder.exists()
    folder.mkdir(mode=0o700)
    (folder / "stages.json").write_bytes(kept)
    # What a storage daemon is to who looks for one: a process with the lock.
    hold = "import fcntl, sys, time; fcntl.lockf(file := open(sys.argv[1], 'w'), 2); print(flush=True)"
    hold += "; time.sleep(99)"
    command = site.host.command(["python3", "-c", hold, folder / "storage.lock"])
    held = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert held.stdout
        held.stdout.read(1)
        assert daemon_of(site, disk.id).pid()
        assert held.wait(timeout=30) == -signal.SIGTERM
        wait_until(lambda: not folder.exists(), "the folder is gone")
    finally:
        held.kill()
        held.communicate()

"""The lab itself, on the real thing: libvirtd, QEMU, guests, and a run that is killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.folders import REPOSITORY
from support.waiting import wait_until
from virt_sse.errors import LabError, LabUnavailableError
from virt_sse.lab.acceleration import Acceleration, GuestName, probe
from virt_sse.lab.cache import cache_directory
from virt_sse.lab.guests import Guest, disk_xml
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import BOOT_SECTOR_TEXT, LinuxMicro, boot_sector_image

BACKEND = REPOSITORY / "backend"
Probe = Callable[[GuestName], Acceleration]

pytestmark = [pytest.mark.usefixtures("as_root"), pytest.mark.libvirt]

MACHINES_OWN = (
    *("/etc/libvirt", "/var/lib/libvirt", "/var/log/libvirt", "/var/cache/libvirt"),
    *("/run/libvirt", "/run/lock", "/dev/hugepages"),
)


@pytest.fixture
def base() -> Iterator[Path]:
    """A folder for lab hosts that no other test sweeps, and QEMU's user can pass through."""
    # Not tmp_path, which is too long for sockets.
    folder = Path(tempfile.mkdtemp(prefix="lab-test-", dir="/tmp"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


def image_at(path: Path, *, stays: bool = False) -> Path:
    try:
        return Path(shutil.copyfile(boot_sector_image(stays=stays), path))
    except LabUnavailableError as exc:
        pytest.skip(f"{exc}; {exc.hint}")


def processes_of(directory: Path) -> list[int]:
    """All processes to which *directory* is mounted, i.e. those in its lab host's namespaces."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/mountinfo"):
        try:
            if f"{directory}/" in entry.read_text():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def machine() -> dict[str, object]:
    """What a lab host could leave on the machine."""
    files = [path for folder in MACHINES_OWN for path in (Path(folder), *Path(folder).rglob("*"))]
    kvm = Path("/dev/kvm")
    return {
        "files": {str(path): path.lstat().st_mtime_ns for path in files if path.exists()},
        "mounts": Path("/proc/self/mounts").read_text(),
        "kvm": kvm.exists() and (kvm.stat().st_mode, kvm.stat().st_gid),
        "hostname": socket.gethostname(),
        "control groups": [str(path) for path in Path("/sys/fs/cgroup").glob("**/*libvirt*")],
    }


def test_boot_sector_reads_and_writes_its_disks(lab_host: LabHost, acceleration: Probe) -> None:
    first, second = image_at(lab_host.images / "first.img"), lab_host.images / "second.img"
    second.write_bytes(bytes(1 << 20))
    disks = [disk_xml(first), disk_xml(second, target="vdb")]
    guest = Guest(lab_host, "two-disks", acceleration=acceleration("boot-sector"), disks=disks)
    guest.start()
    said = guest.wait_shutoff()
    assert said.splitlines() == [
        "boot-sector: hello",
        "boot-sector: disk 0: greetings from sector 1",
        "boot-sector: disk 0: start 1",
        "boot-sector: disk 0: wrote 8 sectors, ok",
        "boot-sector: disk 0: verified 8 sectors, ok",
        "boot-sector: disk 1: ",
        "boot-sector: disk 1: start 1",
        "boot-sector: disk 1: wrote 8 sectors, ok",
        "boot-sector: disk 1: verified 8 sectors, ok",
        "boot-sector: done",
    ]
    written = BOOT_SECTOR_TEXT * 66
    assert second.read_bytes()[512_000:516_096] == written[:4096]
    guest.start()
    assert "disk 0: start 2\n" in guest.wait_shutoff()


def test_every_wait_on_a_host_ends_and_names_what_is_missing(lab_host: LabHost) -> None:
    with pytest.raises(LabError, match=r"waited 0\.5 s in vain for the end of 'sleep 61\.5'"):
        lab_host.run(["sleep", "61.5"], seconds=0.5)
    wait_until(lambda: lab_host.run(["pgrep", "-f", "^sleep 61.5"]).returncode == 1, "sleep ends")

    libvirtd = lab_host.run(["cat", "/run/libvirt/libvirtd.pid"], check=True).stdout.strip()
    lab_host.run(["kill", "-STOP", libvirtd], check=True)
    try:
        with pytest.raises(LabError, match=r"waited 1 s in vain for the end of libvirtd$"):
            lab_host.restart_libvirtd(seconds=1)
    finally:
        lab_host.run(["kill", "-CONT", libvirtd])
    lab_host.restart_libvirtd()
    assert lab_host.virsh("version").returncode == 0


def test_linux_micro_keeps_a_file_system_over_a_reboot(
    lab_host: LabHost, acceleration: Probe, linux_micro: LinuxMicro
) -> None:
    disk = lab_host.images / "file-system.img"
    disk.write_bytes(bytes(16 << 20))
    guest = Guest(
        lab_host,
        "file-system",
        acceleration=acceleration("linux-micro"),
        disks=[disk_xml(disk)],
        boot=linux_micro,
    )
    write = "mke2fs -q /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt && echo kept >/mnt/file && sync"
    assert guest.run_script(write) == ""
    assert b"kept" in disk.read_bytes()
    verify = (
        "mount -t ext4 /dev/vda /mnt && cat /mnt/file || exit 1\n"
        "[ -e /mnt/again ] || { touch /mnt/again /reboot; }"
    )
    assert guest.run_script(verify) == "kept\nkept\n"
    with pytest.raises(LabError, match="the script in linux-micro exited 3") as failure:
        guest.run_script("echo out of order; exit 3")
    assert "out of order" in "".join(failure.value.__notes__)


def test_an_acceleration_is_remembered_for_its_machine(
    acceleration: Probe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acceleration("boot-sector")
    name = "accelerations-boot-sector.json"
    content = json.loads((cache_directory() / name).read_text()) | {"broken": "", "slow": ""}
    monkeypatch.setenv("VIRT_SSE_LAB_CACHE", str(tmp_path))
    (tmp_path / name).write_text(json.dumps(content | {"broken": "it hangs"}))
    assert probe("boot-sector", slow_kvm=True) == Acceleration("boot-sector", "qemu", "it hangs")
    (tmp_path / name).write_text(json.dumps(content | {"slow": "TCG is faster"}))
    assert probe("boot-sector") == Acceleration("boot-sector", "qemu", "TCG is faster")
    assert probe("boot-sector", slow_kvm=True) == Acceleration("boot-sector", "kvm")
    (tmp_path / name).write_text(json.dumps(content | {"machine": "another", "broken": "it hangs"}))
    assert probe("boot-sector").reason != "it hangs"
    assert json.loads((tmp_path / name).read_text())["machine"] == content["machine"]


def test_two_hosts_run_side_by_side(lab_host: LabHost, second_lab_host: LabHost) -> None:
    hosts = (lab_host, second_lab_host)
    names = {host.virsh("hostname").stdout.strip() for host in hosts}
    assert names == {f"{host.name}.test" for host in hosts}
    uuids = {re.search("<uuid>.*?</uuid>", host.virsh("capabilities").stdout)[0] for host in hosts}
    assert len(uuids) == 2
    for host in hosts:
        image = image_at(host.images / "same.img", stays=True)
        guest = Guest(host, "same", acceleration=Acceleration("boot-sector", "qemu"), disks=[disk_xml(image)])
        guest.start()
        guest.wait_for("boot-sector: done")
        assert host.virsh("list", "--name").stdout.split() == ["same"]
    lab_host.virsh("destroy", "same")
    assert lab_host.virsh("list", "--name").stdout.split() == []
    assert second_lab_host.virsh("list", "--name").stdout.split() == ["same"]
    second_lab_host.virsh("destroy", "same")


def test_guests_survive_a_restart_of_libvirtd(lab_host: LabHost) -> None:
    image = image_at(lab_host.images / "survivor.img", stays=True)
    accelerated = Acceleration("boot-sector", "qemu")
    guest = Guest(lab_host, "survivor", acceleration=accelerated, disks=[disk_xml(image)])
    guest.start()
    guest.wait_for("boot-sector: done")
    before = lab_host.run(["pidof", "qemu-system-x86_64", "libvirtd"]).stdout.split()
    lab_host.restart_libvirtd()
    after = lab_host.run(["pidof", "qemu-system-x86_64", "libvirtd"]).stdout.split()
    assert guest.is_active()
    assert len(set(before) & set(after)) == 1, "the same QEMU, another libvirtd"
    guest.destroy()
    guest.undefine()


def test_a_hook_runs_from_the_next_start_of_libvirtd_on(base: Path) -> None:
    with LabHost(base=base) as host:
        hook = host.root / "etc/libvirt/hooks/qemu.d/test"
        hook.write_text('#!/bin/sh\necho "$1 $2" >>/run/hook.log\n')
        hook.chmod(0o755)
        disk = disk_xml(image_at(host.images / "hooked.img", stays=True))
        guest = Guest(host, "hooked", acceleration=Acceleration("boot-sector", "qemu"), disks=[disk])
        log = host.root / "run/hook.log"
        guest.start()
        guest.destroy()
        assert not log.exists()
        host.restart_libvirtd()
        guest.start()
        assert log.read_text().splitlines() == ["hooked prepare", "hooked start", "hooked started"]
        host.restart_libvirtd()
        assert log.read_text().splitlines()[-1] == "hooked reconnect", "it is waited for"


def test_nothing_is_left_on_the_machine(base: Path) -> None:
    before = machine()
    host = LabHost("traceless", base=base)
    with host:
        directory = host.directory
        image = image_at(host.images / "traceless.img")
        kvm_or_not = Acceleration("boot-sector", "qemu")
        guest = Guest(host, "traceless", acceleration=kvm_or_not, disks=[disk_xml(image)])
        guest.start()
        guest.wait_shutoff()
        assert machine() == before
        assert processes_of(directory)
    assert machine() == before
    assert list(base.iterdir()) == []
    assert processes_of(directory) == []
    with pytest.raises(LabError, match="lab host traceless is not running"):
        host.run(["true"])


OWNER = """
import sys, threading, time
from pathlib import Path
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest, disk_xml
from virt_sse.lab.host import LabHost
host = LabHost(base=Path(sys.argv[1]))
starter = threading.Thread(target=host.start)
starter.start()
starter.join()
disks = [disk_xml(Path(sys.argv[2]))]
guest = Guest(host, "stays", acceleration=Acceleration("boot-sector", "qemu"), disks=disks)
guest.start()
guest.wait_for("boot-sector: done")
print(host.directory, flush=True)
time.sleep(600)
"""


def test_a_killed_run_leaves_no_process_and_the_next_one_sweeps(base: Path) -> None:
    image = image_at(base / "killed.img", stays=True)
    environment = os.environ | {"PYTHONPATH": str(BACKEND)}
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, base, image], stdout=subprocess.PIPE, text=True, env=environment
    ) as owner:
        directory = Path(owner.stdout.readline().strip())
        assert directory.parent == base
        commands = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in processes_of(directory)}
        assert {"libvirtd", "virtlogd", "qemu-system-x86"} <= commands, "the starting thread has ended"
        with LabHost(base=base):
            assert directory.exists(), "a living host is not swept"
        owner.send_signal(signal.SIGKILL)
    wait_until(lambda: processes_of(directory) == [], "the host's processes have ended", seconds=10)
    assert directory.exists()
    with LabHost(base=base) as host:
        assert not directory.exists()
        assert host.directory.exists()


def test_a_daemon_that_fails_is_reported_with_its_log(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libvirtd"
    broken.write_text(
        "#!/bin/sh\necho it is broken >>/var/log/libvirt/libvirtd.log\necho no such luck >&2; exit 6\n"
    )
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(LabError, match="libvirtd on lab host unlucky exited 6: no such luck") as failure:
        LabHost("unlucky", base=base).start()
    assert "it is broken" in failure.value.__notes__
    assert list(base.iterdir()) == []


def test_a_missing_tool_is_a_skip_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(boot_sector):\n    assert boot_sector\n")
    environment = os.environ | {"PYTHONPATH": str(BACKEND), "VIRT_SSE_LAB_CACHE": str(tmp_path / "cache")}
    # Where GNU ld was there is now something that cannot be run, for this one process.
    hidden = f"mount --bind /dev/null {Path(shutil.which('ld') or '/usr/bin/ld').resolve()}"
    pytest_run = "-m pytest -rs -p no:virt_sse_lab -p virt_sse.lab.pytest_plugin -p no:cacheprovider"
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{hidden} && exec {sys.executable} {pytest_run} ."],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the lab needs ld; apt-get install binutils" in result.stdout
    assert "1 skipped" in result.stdout


def test_hosts_can_be_started_at_once(base: Path) -> None:
    hosts = [LabHost(base=base) for _ in range(3)]
    threads = [threading.Thread(target=host.start) for host in hosts]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({host.virsh("hostname").stdout for host in hosts}) == 3
    finally:
        for host in hosts:
            host.stop()
    assert list(base.iterdir()) == []

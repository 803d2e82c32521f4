"""Live migration between two hosts with a store in common: keys and leases follow the guest."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import libvirt
import pytest

from support.agent_site import RIGHTS
from support.migration_site import MigrationHost, MigrationSite, MovingGuest, migration_site_fixture
from support.waiting import wait_until
from support.writing_guest import newest_block
from virt_sse.errors import DiskInUseError
from virt_sse.lab import guests
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.ceph import LabCeph
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import QEMU_USER, LabHost
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.model.disks import Disk
from virt_sse.qemu import ceph

Accelerate = Callable[[str], Acceleration]


running_site = migration_site_fixture("running_site")


@pytest.fixture
def site(running_site: MigrationSite) -> Iterator[MigrationSite]:
    yield running_site
    running_site.forget_domains()
    for host in (running_site.a, running_site.b):
        assert host.secrets() == []
        wait_until(lambda host=host: host.leases() == [], "the leases are given back")


@pytest.fixture
def accelerated(acceleration: Accelerate) -> Acceleration:
    return acceleration("boot-sector")


def started(site: MigrationSite, disk: Disk, accelerated: Acceleration, *devices: str) -> Guest:
    element = site.a.backend.domains.disk_element(disk.name)
    guest = Guest(site.a.host, disk.name, acceleration=accelerated, disks=[element], devices=devices)
    guest.start()
    return guest


def assert_runs_on(host: MigrationHost, other: MigrationHost, guest: Guest, disk: Disk) -> None:
    """The domain runs on *host*, which alone has its key and leases; *other* has no process of the domain."""
    assert host.state(guest) == libvirt.VIR_DOMAIN_RUNNING
    assert other.state(guest) is None
    assert other.backend.host.stages.records() == []
    assert host.secrets() == [f"virt-sse:{disk.id}:service"]
    assert other.secrets() == []
    assert disk.id in host.leases()
    assert other.leases() == []
    assert qemu_processes(host, guest) == 1
    assert qemu_processes(other, guest) == 0


def move(
    site: MigrationSite,
    guest: MovingGuest,
    disk: Disk,
    source: MigrationHost,
    target: MigrationHost,
    *options: str,
) -> None:
    """Migrate the guest: it runs and writes on *target* alone."""
    site.migrate(guest, source, target, *options)
    assert_runs_on(target, source, guest, disk)
    guest.await_writes()


def qemu_processes(host: MigrationHost, guest: Guest) -> int:
    listed = host.host.run(["ps", "-eo", "args"], check=True).stdout
    return sum(f"guest={guest.name}," in line for line in listed.splitlines())


@contextlib.contextmanager
def post_copy(host: LabHost) -> Iterator[None]:
    """Run QEMU as root with all capabilities: Linux gives userfaultfd(2) to no other user by default."""
    path = host.directory / "etc/libvirt/qemu.conf"
    before = path.read_text()
    rights = 'user = "root"\ngroup = "root"\ndynamic_ownership = 0\nclear_emulator_capabilities = 0\n'
    path.write_text(before + rights)
    host.restart_libvirtd()
    try:
        yield
    finally:
        path.write_text(before)
        host.restart_libvirtd()


def test_a_guest_takes_its_key_along_while_the_key_is_rotated(
    site: MigrationSite, acceleration: Accelerate, linux_micro: LinuxMicro
) -> None:
    disk = site.disk()
    guest = MovingGuest(site, disk, acceleration("linux-micro"), linux_micro)
    guest.run()
    assert_runs_on(site.a, site.b, guest, disk)
    move(site, guest, disk, site.a, site.b)
    site.keys.rotate(site.set.key.name)
    site.b.virt_sse("des", "rotate", site.set.name)
    move(site, guest, disk, site.b, site.a, "--p2p", "--persistent", "--undefinesource")
    guest.destroy()
    said = site.b.virt_sse("audit", "list", "--disk", str(disk.id), "-o", "json")
    unwrapped = [each for each in json.loads(said) if each["action"] == "unwrap" and each["domain"]]
    assert {(each["domain"], each["source"]) for each in unwrapped} == {
        (guest.name, f"{site.b.host.name}.test")
    }
    stored = site.a.backend.host.store.get(disk.name)
    assert stored.deks[0].wrapped.key.version != disk.deks[0].wrapped.key.version
    assert newest_block(site.content(disk)) >= guest.acknowledged


def test_a_double_disk_is_handed_over_while_the_guest_writes(
    site: MigrationSite, acceleration: Accelerate, linux_micro: LinuxMicro
) -> None:
    disk = site.disk("qcow2", encryption_set=site.double.name)
    guest = MovingGuest(site, disk, acceleration("linux-micro"), linux_micro)
    guest.run()
    assert_runs_on(site.a, site.b, guest, disk)
    move(site, guest, disk, site.a, site.b)
    handed_over = [each.agent.events("disk-handed-over", disk=str(disk.id)) for each in (site.a, site.b)]
    assert list(map(bool, handed_over)) == [True, False]
    site.b.virt_sse("vm", "verify", guest.name)
    move(site, guest, disk, site.b, site.a, "--p2p")
    guest.destroy()
    assert newest_block(site.content(disk)) >= guest.acknowledged


@pytest.fixture
def in_ceph(site: MigrationSite, lab_ceph: LabCeph) -> Iterator[Path]:
    """The place of an image in a Ceph cluster that both hosts know."""
    cluster = lab_ceph.cluster("virt-sse")
    options = f"[ceph]\nmonitors = ['{lab_ceph.monitor}']\nkeyring = '{cluster.keyring}'\n"
    before = {}
    for host in (site.a, site.b):
        path = host.host.root / "etc/virt-sse/config.toml"
        before[path] = path.read_text()
        path.write_text(before[path] + options)
        host.agent.stop()
        host.agent.start()
    ceph.use(cluster)
    yield Path(f"rbd:{lab_ceph.pool}/moving")
    site.forget_domains()
    ceph.use(None)
    for path, content in before.items():
        path.write_text(content)


def test_a_guest_with_a_disk_in_ceph_migrates(
    site: MigrationSite, in_ceph: Path, acceleration: Accelerate, linux_micro: LinuxMicro
) -> None:
    disk = site.disk("raw", place=in_ceph)
    guest = MovingGuest(site, disk, acceleration("linux-micro"), linux_micro)
    guest.run()
    copying = ("--copy-storage-all", "--disks-uri", f"unix://{site.b.sockets}/storage")
    assert_refused(site, guest, "QEMU writes to the image of vda", *copying)
    site.migrate(guest, site.a, site.b)
    assert site.b.state(guest) == libvirt.VIR_DOMAIN_RUNNING
    assert site.a.state(guest) is None
    guest.await_writes()
    guest.destroy()
    assert newest_block(site.content(disk)) >= guest.acknowledged


def test_post_copy_and_cancel_in_the_middle(
    site: MigrationSite, acceleration: Accelerate, linux_micro: LinuxMicro
) -> None:
    disk = site.disk("raw", encryption_set=site.double.name)
    guest = MovingGuest(site, disk, acceleration("linux-micro"), linux_micro)
    guest.run()
    slow = site.command(guest, site.a, site.b, "--bandwidth", "1", serial=site.serial(guest, site.b))
    with subprocess.Popen(slow, env=site.a.host.environment, stderr=subprocess.PIPE, text=True) as running:
        wait_until(
            lambda: "Data processed" in site.a.host.virsh("domjobinfo", guest.name).stdout, "data is sent"
        )
        assert site.b.secrets() == site.a.secrets() != []
        assert disk.id in site.b.leases()
        with (
            pytest.raises(DiskInUseError, match="is about to migrate to host"),
            site.a.backend.host.locks.hold(disk.id),
        ):
            pass
        site.a.host.virsh("domjobabort", guest.name)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 1, said
    assert_runs_on(site.a, site.b, guest, disk)
    guest.await_writes()
    with post_copy(site.b.host):
        move(site, guest, disk, site.a, site.b, "--postcopy", "--postcopy-after-precopy")
    guest.destroy()


@pytest.fixture
def own_images(site: MigrationSite) -> Iterator[Path]:
    """A folder of host b's own in the place of the folder of images in common; empty."""
    folder = site.b.host.directory / "own-images"
    folder.mkdir()
    folder.chmod(0o755)
    site.b.host.run(["mount", "--bind", folder, site.images], check=True)
    yield folder
    site.b.host.run(["umount", site.images], check=True)
    shutil.rmtree(folder)


def assert_refused(site: MigrationSite, guest: Guest, reason: str, *options: str) -> None:
    """The migration to host b is refused with the reason at the source; the guest runs on."""
    keys, leases = site.a.secrets(), site.a.leases()
    done = site.migrate(guest, site.a, site.b, *options, check=False)
    assert done.returncode == 1
    assert reason in done.stderr, done.stderr
    assert site.a.state(guest) == libvirt.VIR_DOMAIN_RUNNING
    assert site.a.secrets() == keys
    assert site.a.leases() == leases
    assert site.b.state(guest) is None
    assert site.b.secrets() == []
    assert site.b.leases() == []
    assert qemu_processes(site.b, guest) == 0


def test_a_host_without_the_image_or_with_another_is_refused(
    site: MigrationSite, accelerated: Acceleration, own_images: Path
) -> None:
    disk, other = site.disk(), site.disk()
    guest = started(site, disk, accelerated)
    assert_refused(site, guest, f"image {disk.path} is missing")
    socket = f"unix://{site.b.sockets}/storage"
    copying = ("--copy-storage-all", "--disks-uri", socket)
    assert_refused(site, guest, f"image {disk.path} is missing", *copying)
    assert list(own_images.iterdir()) == []
    shutil.copy(other.path, own_images / disk.path.name)
    assert_refused(site, guest, "is the image of another disk")
    shutil.copy(disk.path, own_images / disk.path.name)
    shutil.chown(own_images / disk.path.name, QEMU_USER)
    before = (own_images / disk.path.name).read_bytes()
    assert_refused(site, guest, "is not the image in use on the source")
    assert_refused(site, guest, "is not the image in use on the source", *copying)
    assert (own_images / disk.path.name).read_bytes() == before
    guest.destroy()


def test_host_caches_and_temporary_disks_do_not_migrate(
    site: MigrationSite, accelerated: Acceleration
) -> None:
    cached, guest = (started(site, site.disk(), accelerated) for _ in range(2))
    for each, option in ((cached, ("--disk-caching", "vda=ReadOnly")), (guest, ("--temp-disk-size", "1M"))):
        each.destroy()
        site.a.virt_sse("vm", "update", each.name, "--encryption-at-host", "on", *option)
        site.a.host.virsh("start", each.name)
    assert_refused(site, cached, "has a host cache, which does not migrate")
    assert_refused(site, guest, "has a temporary disk, which does not migrate")


def test_a_host_without_rights_and_a_copy_of_the_storage_are_refused(
    site: MigrationSite, accelerated: Acceleration
) -> None:
    disk = site.disk()
    guest = started(site, disk, accelerated)
    assert_refused(
        site,
        guest,
        "Block node is read-only",
        *("--copy-storage-all", "--disks-uri", f"unix://{site.b.sockets}/shared"),
    )
    identity = site.identities[site.b.id]
    site.keys.administration.set_permissions(identity, ())
    assert_refused(site, guest, f"can permit principal {identity}")
    site.keys.administration.set_permissions(identity, RIGHTS)
    guest.destroy()


def test_a_domain_that_is_off_migrates_as_a_definition(
    site: MigrationSite, accelerated: Acceleration
) -> None:
    """Its token is of no use, once or later: the domain starts as any other."""
    disk = site.disk()
    guest = started(site, disk, accelerated)
    guest.destroy()
    site.a.host.run(
        ["virsh", "migrate", guest.name, site.b.host.uri, "--offline", "--persistent"], check=True
    )
    at_once = site.b.host.virsh("start", guest.name, check=False)
    assert "after an offline migration, start the domain again" in at_once.stderr
    assert site.b.leases() == []
    site.b.host.virsh("start", guest.name)
    assert_runs_on(site.b, site.a, guest, disk)
    assert "is in use on host" in site.a.host.virsh("start", guest.name, check=False).stderr


RACER = """
import sys; from pathlib import Path
from virt_sse.backend import Backend; from virt_sse.domains.release import release
from virt_sse.errors import DiskInUseError; from virt_sse.libvirt.domain_definition import DomainDefinition
definition = DomainDefinition.parse(Path(sys.argv[1]).read_text())
with Backend.open() as backend:
    for line in sys.stdin:
        if line == "release\\n":
            release(backend.host.config, definition); print("released", flush=True); continue
        try: backend.domains.prepare(definition); print("won", flush=True)
        except DiskInUseError: print("lost", flush=True)
"""
"""Serves the hook's events, as the hook without an agent, over and over."""


def test_of_two_hosts_exactly_one_starts_a_disk_every_time(
    request: pytest.FixtureRequest, site: MigrationSite, tmp_path: Path
) -> None:
    disk = site.disk()
    element = site.a.backend.domains.disk_element(disk.name)
    path = tmp_path / "domain.xml"
    log = tmp_path / "log"
    path.write_text(guests.domain_xml(disk.name, domain_type="qemu", disks=[element], serial_log=log))
    with contextlib.ExitStack() as stack:
        racers = [
            stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", RACER, str(path)],
                    env=host.host.environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for host in (site.a, site.b)
        ]
        for _ in range(int(request.config.getoption("--races"))):
            for racer in racers:
                tell(racer, "prepare")
            outcomes = [heard(racer) for racer in racers]
            assert sorted(outcomes) == ["lost", "won"]
            winner = outcomes.index("won")
            for racer in (
                racers[1 - winner],
                racers[winner],
            ):  # libvirt calls the hook after a refusal as well
                tell(racer, "release")
                assert heard(racer) == "released"
    site.a.backend.disks.check(disk.name)


def tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{line}\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()

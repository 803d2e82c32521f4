"""Two hosts with one store in PostgreSQL: each works on what is its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import pytest

from support import images
from support.command_line import CommandLine, no_libvirt
from support.postgresql import PostgresqlServer
from support.stores import execute
from virt_sse.agent import lease_watch
from virt_sse.agent.automatic_rotation import AutomaticRotation
from virt_sse.agent.inventory import InventorySnapshot, RunningDomain
from virt_sse.agent.lease_watch import LeaseWatch
from virt_sse.agent.metrics import Metrics
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains.incoming import IncomingDomains
from virt_sse.domains.release import release
from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    DiskStateError,
    HostFencedError,
    LibvirtError,
    VirtSseError,
)
from virt_sse.host.setup import initialise
from virt_sse.keys.leases import Leases
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import PLATFORM_KEY, Disk, DiskState, NewDisk
from virt_sse.model.hosts import SILENT_SECONDS
from virt_sse.model.layers import EncryptionType
from virt_sse.store import LazyStore
from virt_sse.system.database_url import sqlite_url

VM = uuid.UUID("0b2d2d1c-9d3c-4a83-9d0c-7a1d5a3f8f10")


class Hosts:
    """Hosts by name, each with files of its own.

    :ivar url: of the store in common.
    """

    def __init__(self, folder: Path, url: str, stack: ExitStack) -> None:
        self.folder = folder
        self.url = url
        self._stack = stack

    def config(self, name: str) -> Config:
        root = self.folder / name
        path = root / "etc/virt-sse/config.toml"
        if not path.exists():
            path.parent.mkdir(parents=True)
            (root / "var/lib/libvirt/images").mkdir(parents=True)
            path.write_text(f"[store]\nurl = '{self.url}'\n[libvirt]\nuri = '{no_libvirt(root)}'\n")
        return Config.load(root)

    def backend(self, name: str) -> Backend:
        """A backend as a new command opens it; closed with the test."""
        backend = self._stack.enter_context(Backend(self.config(name)))
        initialise(backend.host)
        return backend

    def make_silent(self) -> None:
        execute(self.url, "UPDATE hosts SET seen = seen - :age", age=SILENT_SECONDS)


@pytest.fixture
def hosts(tmp_path: Path, postgresql: PostgresqlServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hosts]:
    images.require("qemu-img", "cryptsetup")
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    with postgresql.database() as name, ExitStack() as stack:
        yield Hosts(tmp_path, postgresql.url(name), stack)


@pytest.fixture
def a(hosts: Hosts) -> Backend:
    return hosts.backend("a")


@pytest.fixture
def b(hosts: Hosts, a: Backend) -> Backend:
    """Host b has the platform keyring and the host key of host a."""
    state = hosts.config("b").state_directory
    state.mkdir(mode=0o700, parents=True)
    ours = a.host.config.state_directory
    shutil.copytree(ours / "platform-managed", state / "platform-managed")
    shutil.copy(ours / "host.key", state)
    backend = hosts.backend("b")
    backend.host.leases.renew()
    return backend


@pytest.fixture
def disk(a: Backend) -> Disk:
    return a.disks.create(NewDisk(name="disk", size=1 << 20))


def definition(backend: Backend, disk: Disk) -> DomainDefinition:
    element = backend.domains.disk_element(disk.name)
    return DomainDefinition.parse(
        f"<domain type='qemu'><name>web</name><uuid>{VM}</uuid><devices>{element}</devices></domain>"
    )


def leases(backend: Backend) -> list[int]:
    return sorted(each.leases for each in backend.host.leases.hosts())


def test_a_hosts_id_is_its_own_and_private(hosts: Hosts, a: Backend, b: Backend) -> None:
    path = hosts.config("a").state_directory / "host-id"
    assert path.stat().st_mode & 0o777 == 0o600
    assert a.host.leases.identity.id == uuid.UUID(path.read_text().strip())
    assert a.host.leases.identity.id != b.host.leases.identity.id
    assert hosts.backend("a").host.leases.identity == a.host.leases.identity


def test_a_finished_command_leaves_no_lease(a: Backend, disk: Disk) -> None:
    assert disk.state is DiskState.READY
    assert leases(a) == [0]
    a.disks.check("disk")
    assert leases(a) == [0]


def test_a_host_leaves_the_killed_work_of_others_alone(
    hosts: Hosts, a: Backend, b: Backend, disk: Disk
) -> None:
    a.host.store.hosts.work(a.host.leases.identity, disk.id)  # as by a killed deletion
    a.host.store.set_state(disk.id, DiskState.DELETING)
    hosts.backend("b")
    assert b.host.store.get("disk").state is DiskState.DELETING
    assert disk.path.exists()
    with pytest.raises(VirtSseError):
        b.disks.check("disk")
    hosts.backend("a")
    assert b.host.store.all() == []
    assert not disk.path.exists()
    assert leases(hosts.backend("a")) == [0, 0]


def test_a_killed_command_holds_other_hosts_up_until_the_next(
    hosts: Hosts, a: Backend, b: Backend, disk: Disk
) -> None:
    a.host.store.hosts.work(a.host.leases.identity, disk.id)
    with pytest.raises(DiskInUseError, match="in use on host"):
        b.disks.check("disk")
    with a.host.locks.hold(disk.id):
        hosts.backend("a")  # another command of the same host: the work under way keeps its lease
        with pytest.raises(DiskInUseError, match="in use on host"):
            b.disks.check("disk")
    assert leases(a) == [0, 0]


def test_a_start_is_refused_while_another_host_uses_the_disk(
    hosts: Hosts, a: Backend, b: Backend, disk: Disk
) -> None:
    b.host.freshness.begin_use(disk)  # an earlier use
    with a.host.leases.starting(uuid.uuid4(), [disk.id], states=[DiskState.READY]):
        pass
    with pytest.raises(DiskInUseError, match="disk 'disk' is in use on host"):
        b.domains.prepare(definition(b, disk))
    with pytest.raises(DiskInUseError):
        b.disks.check("disk")
    image = disk.path.read_bytes()
    with pytest.raises(LibvirtError):  # for libvirt's secrets
        release(hosts.config("b"), definition(b, disk))
    assert disk.path.read_bytes() == image, "libvirt releases a refused start too"
    assert leases(a) == [0, 2]


def test_a_failed_start_gives_its_leases_back(a: Backend, disk: Disk) -> None:
    with pytest.raises(LibvirtError):  # there is no libvirt
        a.domains.prepare(definition(a, disk))
    assert leases(a) == [0]


def test_the_end_of_a_domain_gives_its_leases_back(hosts: Hosts, a: Backend, disk: Disk) -> None:
    with a.host.leases.starting(VM, [disk.id], states=[DiskState.READY]):
        pass
    assert leases(a) == [2]
    with pytest.raises(LibvirtError):  # for libvirt's secrets
        release(hosts.config("a"), definition(a, disk))
    assert leases(a) == [0]


def snapshot(*domains: RunningDomain, number: int = 1) -> InventorySnapshot:
    return InventorySnapshot(number=number, domains=domains, time=time.time())


def running(backend: Backend, disk: Disk) -> RunningDomain:
    found = definition(backend, disk)
    return RunningDomain(VM, 1, "web", tuple(found.our_disks), True, False, frozenset(), found)


def test_the_agent_takes_and_gives_back_leases(
    hosts: Hosts, a: Backend, b: Backend, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    domain = running(a, disk)
    LeaseWatch(a.host.leases).keep(snapshot(domain), is_current=True)
    assert leases(a) == [0, 2]
    watch = LeaseWatch(b.host.leases)
    watch.keep(snapshot(domain), is_current=True)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == ["lease-conflict"]
    LeaseWatch(a.host.leases).keep(snapshot(), is_current=True)  # the domain may be about to start
    assert leases(a) == [0, 2]
    execute(hosts.url, "UPDATE lease_users SET since = since - 1000")
    LeaseWatch(a.host.leases).keep(snapshot(), is_current=False)
    assert leases(a) == [0, 2]
    LeaseWatch(a.host.leases).keep(snapshot(domain), is_current=True)
    assert leases(a) == [0, 2]
    LeaseWatch(a.host.leases).keep(snapshot(), is_current=True)
    assert leases(a) == [0, 0]


def test_an_old_snapshot_takes_and_gives_back_no_lease(
    a: Backend, hosts: Hosts, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of a domain, and a start, may be newer than the snapshot that the agent looks at."""
    monkeypatch.setattr(lease_watch, "_RENEW_SECONDS", 0)
    domain, watch = running(a, disk), LeaseWatch(a.host.leases)
    watch.note_end(VM, 1)
    for number in (1, 2):  # the second had begun before the end
        watch.keep(snapshot(domain, number=number), is_current=True)
        assert leases(a) == [0]
    watch.keep(snapshot(domain, number=3), is_current=True)
    assert leases(a) == [2]
    execute(hosts.url, "UPDATE lease_users SET since = since - 1000")
    old = dataclasses.replace(snapshot(number=4), time=time.time() - 900)
    watch.keep(old, is_current=True)
    assert leases(a) == [2]
    watch.keep(snapshot(number=5), is_current=True)
    assert leases(a) == [0]


def test_a_dead_host_is_fenced_by_command(hosts: Hosts, a: Backend, b: Backend, disk: Disk) -> None:
    with a.host.leases.starting(VM, [disk.id], states=[DiskState.READY]):
        pass
    cli = CommandLine(hosts.folder / "b")
    identity = str(a.host.leases.identity.id)
    assert "is alive" in cli.refuses("host", "fence", identity, "--yes")
    hosts.make_silent()
    rows = {each["id"]: each for each in json.loads(cli("host", "list", "-o", "json"))}
    assert (rows[identity]["state"], rows[identity]["leases"], rows[identity]["this"]) == ("silent", 2, "no")
    assert "cannot fence itself" in cli.refuses(
        "host", "fence", str(b.host.leases.identity.id), "--yes", status=2
    )
    assert "2 leases taken back" in cli("host", "fence", identity, "--yes")
    assert "fence" in cli("audit", "list")
    b.disks.check("disk")
    with pytest.raises(HostFencedError):
        a.disks.check("disk")
    with pytest.raises(HostFencedError):
        a.host.leases.renew()


def test_a_domain_migrates_with_its_leases(hosts: Hosts, a: Backend, b: Backend, disk: Disk) -> None:
    states = [DiskState.READY]
    with a.host.leases.starting(VM, [disk.id], states=states):
        pass
    with contextlib.suppress(LibvirtError), b.host.leases.awaiting(VM, [disk.id], states=states):
        assert b.host.leases.awaits(VM)
        raise LibvirtError("refused")
    assert not b.host.leases.awaits(VM)
    with b.host.leases.awaiting(VM, [disk.id], states=states):
        pass
    image = disk.path.read_bytes()
    b.domains.announce(definition(b, disk))
    with pytest.raises(LibvirtError):  # a migration that fails later: the image belongs to host a
        release(hosts.config("b"), definition(b, disk))
    assert disk.path.read_bytes() == image
    assert leases(a) == [0, 2]
    with b.host.leases.awaiting(VM, [disk.id], states=states):
        pass
    with pytest.raises(LibvirtError):
        release(hosts.config("a"), definition(a, disk))
    assert disk.path.read_bytes() != image
    assert not b.host.leases.awaits(VM)
    assert {use.resource_id for use in b.host.leases.uses()} == {VM, disk.id}


def test_a_disk_that_receives_content_is_like_the_other_and_has_other_keys(
    hosts: Hosts, a: Backend, b: Backend, disk: Disk
) -> None:
    with a.host.leases.starting(VM, [disk.id], states=[DiskState.READY]):
        pass
    with pytest.raises(DiskInUseError, match="in use on this host"):
        a.receiving.prepare("disk")
    web = definition(b, disk)
    target = b.receiving.prepare("disk", new_name="there")
    assert (target.state, target.size, target.format) == (DiskState.RECEIVING, disk.size, disk.format)
    assert target.guest_serial == disk.guest_serial
    assert target.deks != disk.deks
    with pytest.raises(DiskExistsError, match="'there' waits for the content of disk 'disk' already"):
        b.receiving.prepare("disk", new_name="again")
    with pytest.raises(DiskInUseError, match="in use on host"):
        a.erasure.erase(target)
    assert a.host.leases.uses() != []
    b.host.leases.end_killed_work()
    moved = DomainDefinition.parse(b.domains.announce(web))
    assert [(use.disk_id, use.source) for use in moved.our_disks] == [(target.id, target.path)]
    with pytest.raises(DiskStateError, match="is receiving"):
        b.domains.prepare(definition(b, target))
    for named in (web, definition(b, target)):  # by 'virsh migrate --xml'
        b.domains.announce(named)
        note = IncomingDomains(hosts.config("b")).find(VM)
        assert note is not None
        assert note.received == {target.id}
    sealed = hosts.config("b").image_states / str(target.id)
    content = sealed.read_bytes()
    sealed.unlink()  # the store's word alone
    with pytest.raises(DiskStateError, match="was not made by"):
        b.domains.announce(web)
    sealed.write_bytes(content)
    b.host.store.set_size(disk.id, 2 << 20)
    with pytest.raises(DiskStateError, match="has size"):
        b.domains.announce(web)
    assert b.disks.trust("there").state is DiskState.READY  # the operator saw the domain arrive
    again = b.receiving.prepare("disk")
    assert again.name == f"disk.{b.host.leases.identity.name.partition('.')[0]}"
    assert b.soft_deletion.retention
    b.erasure.erase(again)
    assert again.id not in {each.id for each in b.host.store.all()}


def test_the_agent_ends_a_migration_of_which_nothing_is_left(
    hosts: Hosts, a: Backend, b: Backend, disk: Disk
) -> None:
    with (
        a.host.leases.starting(VM, [disk.id], states=[DiskState.READY]),
        b.host.leases.awaiting(VM, [disk.id], states=[DiskState.READY]),
    ):
        pass
    LeaseWatch(b.host.leases).keep(snapshot(running(b, disk)), is_current=True)
    assert b.host.leases.awaits(VM)
    execute(hosts.url, "UPDATE lease_handovers SET since = since - 1000")
    LeaseWatch(b.host.leases).keep(snapshot(), is_current=True)
    assert not b.host.leases.awaits(VM)
    assert leases(a) == [0, 2]


def test_each_agent_follows_a_new_key_version_for_its_own_disks(
    a: Backend, b: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """Disks of other hosts, and disks in use there, are left to the agents of those hosts."""
    a.sets.create(
        "web",
        provider=PLATFORM_KEY.provider,
        key=PLATFORM_KEY.name,
        encryption_type=EncryptionType.CUSTOMER_KEY,
        automatic_rotation=True,
    )
    ours = a.disks.create(NewDisk(name="ours", size=1 << 20, encryption_set="web"))
    theirs = b.disks.create(NewDisk(name="theirs", size=1 << 20, encryption_set="web"))
    moved = a.disks.create(NewDisk(name="moved", size=1 << 20, encryption_set="web"))
    with b.host.leases.starting(VM, [moved.id], states=[DiskState.READY]):
        pass
    provider = a.host.plugins.key_provider(PLATFORM_KEY.provider)
    wanted = provider.rotate(PLATFORM_KEY.name)
    AutomaticRotation(a, Metrics(), 60)._follow(a.sets.get("web"))
    versions = {disk.id: disk.deks[0].wrapped.key for disk in a.host.store.all()}
    assert versions[ours.id] == wanted
    assert {versions[theirs.id], versions[moved.id]} == {theirs.deks[0].wrapped.key}
    assert [record.message for record in caplog.records if record.levelname != "INFO"] == []


def test_a_store_in_sqlite_has_no_leases(backend: Backend, virt_sse: CommandLine) -> None:
    disk = backend.disks.create(NewDisk(name="disk", size=1 << 20))
    with backend.host.leases.starting(VM, [disk.id], states=[]):
        assert backend.host.leases.uses() == []
    (row,) = json.loads(virt_sse("host", "list", "-o", "json"))
    assert row["this"] == "yes"
    assert backend.host.store.hosts.all() == []


def test_of_two_machines_exactly_one_starts_domains_with_a_store_in_sqlite(tmp_path: Path) -> None:
    """A hundred times: the first to start a domain is noted beside the database."""
    (tmp_path / "shared").mkdir()
    url = sqlite_url(tmp_path / "shared/store.sqlite")
    configs = []
    for name in ("a", "b"):
        identity = tmp_path / name / "etc/machine-id"
        identity.parent.mkdir(parents=True)
        identity.write_text(f"{uuid.uuid4().hex}\n")
        configs.append(dataclasses.replace(Config.load(tmp_path / name), store_url=url))
    rounds, barrier = 100, Barrier(2)
    refusals = []

    def race(config: Config) -> list[bool]:
        won = []
        for _ in range(rounds):
            barrier.wait(30)
            try:
                with Leases(config, LazyStore(url)).starting(VM, [], states=[]):
                    won.append(True)
            except DiskInUseError as exc:
                won.append(False)
                refusals.append(exc)
            if barrier.wait(30) == 0:
                (tmp_path / "shared/store.sqlite.machine").unlink()
        return won

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(race, configs)
    assert [a + b for a, b in zip(first, second, strict=True)] == [1] * rounds
    assert "belongs to the machine" in str(refusals[0])
    assert "store migrate" in str(refusals[0].hint)
    assert list((tmp_path / "shared").iterdir()) == []
    unnamed = dataclasses.replace(Config.load(tmp_path / "c"), store_url=url)
    for config in (configs[0], unnamed):
        with Leases(config, LazyStore(url)).starting(VM, [], states=[]):
            pass
    note = tmp_path / "shared/store.sqlite.machine"
    assert note.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "a/etc/machine-id").read_text().strip() not in note.read_text()

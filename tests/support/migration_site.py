"""Two lab hosts with a store and a folder of images in common, and guests that migrate between the hosts."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import libvirt
import pytest

from support.agent_site import CONFIG, RIGHTS, forget_domains, prepared, secret_usages, share_keys
from support.customer_keys import CustomerKeys
from support.loaded_commands import run_command
from support.postgresql import PostgresqlServer
from support.writing_guest import WritingGuest
from virt_sse.backend import Backend
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import QEMU_GROUP, QEMU_USER, LabHost
from virt_sse.lab.recipes import LinuxMicro, boot_sector_image
from virt_sse.lab.vaults import LabVault
from virt_sse.libvirt.domains import gone_is_fine
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk, NewDisk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.layers import EncryptionType, Placement
from virt_sse.qemu.reading import plaintext
from virt_sse.vault_client.permissions import Role

_CONFIG = CONFIG + "poll-seconds = 0.4\n"


class MigrationHost:
    """A host of the site.

    :ivar sockets: folder for the sockets of migrations to this host, which QEMU's user may write.
    """

    def __init__(self, host: LabHost, backend: Backend, sockets: Path) -> None:
        self.host = host
        self.backend = backend
        self.agent = LabAgent(host)
        self.sockets = sockets

    @cached_property
    def pid_namespace(self) -> str:
        """The PID namespace of the host's processes, as in proc(5)."""
        return self.host.run(["readlink", "/proc/self/ns/pid"], check=True).stdout.strip()

    @property
    def id(self) -> uuid.UUID:
        """The host's id in the store."""
        return self.backend.host.leases.identity.id

    def virt_sse(self, *arguments: str | Path, status: int = 0) -> str:
        """Standard output and errors of a command on this host, which must exit with *status*."""
        done = run_command(arguments, self.host.environment, together=True)
        assert done.returncode == status, done.stdout
        assert "Traceback" not in done.stdout
        return done.stdout

    def secrets(self) -> list[str]:
        return secret_usages(self.host)

    def state(self, guest: Guest) -> int | None:
        """libvirt's state of the running domain; ``None`` if the domain does not run here."""
        with contextlib.closing(self.host.connect()) as connection:
            for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                if domain.name() == guest.name:
                    with gone_is_fine():
                        return int(domain.state()[0])
        return None

    def leases(self) -> list[uuid.UUID]:
        """The disks and VMs with a lease of this host, sorted."""
        return sorted({use.resource_id for use in self.backend.host.leases.uses()})


class MigrationSite:
    """Two hosts, :attr:`a` and :attr:`b`, each with an identity of its own for each set.

    :ivar set: of disks with a single layer.
    :ivar double: of disks with two layers, the second in a storage daemon.
    :ivar placed_below: of disks with a single layer, in a storage daemon.
    :ivar images: the folder of images in common.
    :ivar url: of the store in common.
    """

    def __init__(self, a: MigrationHost, b: MigrationHost, keys: CustomerKeys, url: str) -> None:
        self.a, self.b, self.keys, self.url = a, b, keys, url
        self.images = a.backend.host.config.disk_directory
        self.set = self.new_set("moving", EncryptionType.CUSTOMER_KEY)
        self.double = self.new_set("double", EncryptionType.PLATFORM_AND_CUSTOMER_KEYS)
        self.placed_below = self.new_set("below", EncryptionType.CUSTOMER_KEY, Placement.STORAGE)

    def new_set(self, name: str, kind: EncryptionType, placement: Placement | None = None) -> EncryptionSet:
        """A set of which both hosts may use the key."""
        made = self.a.backend.sets.create(
            name,
            provider="customer-managed",
            key=self.keys.new_key(),
            encryption_type=kind,
            placement=placement,
        )
        assert made.identity
        self.keys.administration.set_permissions(made.identity, RIGHTS)
        own = self.b.backend.host.config.identity(made.id)
        own.parent.mkdir(mode=0o700, exist_ok=True)
        shutil.copy(self.keys.new_identity(*RIGHTS), own)
        return made

    @property
    def identities(self) -> dict[uuid.UUID, str]:
        """The client id of the set's identity on each host, by host id."""
        return {
            each.id: CustomerKeys.client_id(each.backend.host.config.identity(self.set.id))
            for each in (self.a, self.b)
        }

    def disk(
        self, image_format: str = "qcow2", *, encryption_set: str | None = None, place: Path | None = None
    ) -> Disk:
        """A disk of the set, made on host :attr:`a`, with a boot-sector guest that stays."""
        new = NewDisk(
            name=f"m{uuid.uuid4().hex[:8]}",
            format=DiskFormat(image_format),
            encryption_set=encryption_set or self.set.name,
            place=place,
        )
        return self.a.backend.transfer.import_image(new, boot_sector_image(stays=True), source_format="raw")

    def content(self, disk: Disk) -> bytes:
        """The plaintext of a disk that is not in use."""
        backend = self.a.backend
        stored = backend.host.store.get(disk.name)
        with plaintext(stored.path, stored.format, backend.host.keys.unwrap_all(stored)) as reader:
            return reader.read(0, reader.size)

    def migrate(
        self, guest: Guest, source: MigrationHost, target: MigrationHost, *options: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Migrate a running guest by ``virsh migrate`` on the source."""
        serial = self.serial(guest, target)
        done = subprocess.run(
            self.command(guest, source, target, *options, serial=serial),
            env=source.host.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert not check or done.returncode == 0, done.stderr
        if done.returncode == 0 and isinstance(guest, MovingGuest):
            guest.move(target.host, serial)
        return done

    def command(
        self, guest: Guest, source: MigrationHost, target: MigrationHost, *options: str, serial: Path
    ) -> list[str]:
        """The command line of a migration of a guest whose output then goes to *serial*.

        Under TCG, the guest's processors stand still while its memory is copied, except for a post-copy: QEMU
        7.2 loses writes of an emulated guest to its memory in a live migration, so that kernels panic, also
        of guests without a disk.
        """
        is_live = guest.domain_type == "kvm" or "--postcopy" in options
        described = target.host.directory / f"{serial.stem}.xml"
        xml = live_xml(source.host, guest).replace(str(guest.serial_log), str(serial))
        described.write_text(on_host(xml, source.host, target.host))
        if "--migrateuri" not in options:
            options = ("--migrateuri", f"unix://{target.sockets / serial.stem}", *options)
        return [
            *("virsh", "migrate", guest.name, target.host.uri, *(["--live"] if is_live else [])),
            *("--unsafe", "--xml", str(described), *options),
        ]

    def serial(self, guest: Guest, target: MigrationHost) -> Path:
        """A new file for a guest's output on *target*: a start of QEMU truncates the file."""
        path = target.host.directory / "serial" / f"{guest.name}-{uuid.uuid4().hex[:8]}"
        path.parent.mkdir(exist_ok=True)
        return path

    def forget_domains(self) -> None:
        for each in (self.a, self.b):
            forget_domains(each.host)


class MovingGuest(WritingGuest):
    """A writing guest that migrates; defined on host :attr:`MigrationSite.a`.

    :param at_host: whether its VM has encryption at host.
    """

    def __init__(
        self,
        site: MigrationSite,
        disk: Disk,
        acceleration: Acceleration,
        boot: LinuxMicro,
        *,
        at_host: bool = False,
    ) -> None:
        self._disk, self._at_host, self._said = disk, at_host, ""
        element = site.a.backend.domains.disk_element(disk.name)
        super().__init__(site.a.host, disk.name, disk=element, acceleration=acceleration, boot=boot)
        self._define_on(site.a)

    def move(self, host: LabHost, serial_log: Path) -> None:
        """The guest runs on *host* now, and prints to *serial_log*."""
        self._said = self.serial
        self._host, self.serial_log = host, serial_log

    def restart(self, host: MigrationHost, serial_log: Path) -> None:
        """Start the guest, which runs nowhere, on *host*."""
        self._said = ""
        self._disks = (host.backend.domains.disk_element(self._disk.name),)
        self._host, self.serial_log = host.host, serial_log
        self._define_on(host)
        self.run()

    def _define_on(self, host: MigrationHost) -> None:
        self.define()
        if self._at_host:
            host.virt_sse("vm", "update", self.name, "--encryption-at-host", "on")

    @property
    def serial(self) -> str:
        return self._said + super().serial


def on_host(xml: str, source: LabHost, target: LabHost) -> str:
    """XML of one host for another: real hosts have the same paths."""
    for own in ("run", "var"):
        xml = xml.replace(f"{source.root}/{own}/", f"{target.root}/{own}/")
    return xml


def live_xml(host: LabHost, guest: Guest) -> str:
    """The definition of a running domain, for a migration."""
    with contextlib.closing(host.connect()) as connection:
        flags = libvirt.VIR_DOMAIN_XML_MIGRATABLE | libvirt.VIR_DOMAIN_XML_SECURE
        return str(connection.lookupByName(guest.name).XMLDesc(flags))


@contextlib.contextmanager
def migration_site(
    hosts: tuple[LabHost, LabHost], vault: LabVault, folder: Path, postgresql: PostgresqlServer
) -> Iterator[MigrationSite]:
    """Two initialised hosts with agents.

    :param folder: for images and sockets; other users may pass through.
    """
    for name in ("images", "sockets"):
        (folder / name).mkdir()
        shutil.chown(folder / name, QEMU_USER, QEMU_GROUP)
    with contextlib.ExitStack() as stack:
        url = postgresql.url(stack.enter_context(postgresql.database()))
        keys = stack.enter_context(CustomerKeys(vault, folder / "identities"))
        made: list[MigrationHost] = []
        for host in hosts:
            if made:
                share_keys(made[0].host, host)
            config = f"[store]\nurl = '{url}'\n{_CONFIG}"
            backend = stack.enter_context(prepared(host, config, images=folder / "images"))
            each = MigrationHost(host, backend, folder / "sockets")
            stack.enter_context(each.agent)
            made.append(each)
        a, b = made
        path = a.backend.host.config.operator_credential
        path.unlink(missing_ok=True)  # of another module of tests on this host
        keys.administration.new_credential_file(
            path, f"host-{uuid.uuid4().hex[:8]}", role=Role.IDENTITY_OPERATOR
        )
        stack.callback(path.unlink)
        site = MigrationSite(a, b, keys, url)
        stack.callback(site.forget_domains)
        yield site


def migration_site_fixture(name: str) -> Any:
    """A fixture with this name: a site for all tests of a module."""

    @pytest.fixture(scope="module", name=name)
    def site(
        lab_host: LabHost, second_lab_host: LabHost, lab_vault: LabVault, postgresql: PostgresqlServer
    ) -> Iterator[MigrationSite]:
        with TemporaryDirectory(prefix="virt-sse-") as folder:
            Path(folder).chmod(0o711)
            with migration_site((lab_host, second_lab_host), lab_vault, Path(folder), postgresql) as site:
                yield site

    return site

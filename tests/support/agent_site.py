"""A lab host with an agent, and guests whose disks are under keys of a lab vault."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import libvirt

from support.customer_keys import CustomerKeys
from support.loaded_commands import run_command
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.host.setup import initialise
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disks import Disk, DiskSku, NewDisk
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyId
from virt_sse.model.layers import Placement
from virt_sse.vault_client.permissions import Permission, Role

RIGHTS = (Permission.GET, Permission.WRAP_KEY, Permission.UNWRAP_KEY)

CONFIG = """\
[agent]
probe-seconds = 3
rotation-seconds = 1
"""


@contextlib.contextmanager
def prepared(host: LabHost, config: str = CONFIG, *, images: Path | None = None) -> Iterator[Backend]:
    """The backend of an initialised lab host whose libvirtd runs our hook; *config* is in force meanwhile.

    :param images: folder of new images; default: the host's.
    """
    path = host.root / "etc/virt-sse/config.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(config)
    try:
        loaded = dataclasses.replace(
            Config.load(host.root), libvirt_uri=host.uri, disk_directory=images or host.images
        )
        with Backend(loaded) as backend:
            if initialise(backend.host):
                host.restart_libvirtd()
            yield backend
    finally:
        path.unlink()


def share_keys(source: LabHost, target: LabHost) -> None:
    """Give *target* the platform keyring and the host key of *source*, as on hosts that share disks."""
    ours, theirs = (each.root / "var/lib/virt-sse" for each in (source, target))
    theirs.mkdir(mode=0o700, parents=True, exist_ok=True)
    shutil.rmtree(theirs / "platform-managed", ignore_errors=True)
    shutil.copytree(ours / "platform-managed", theirs / "platform-managed")
    shutil.copy(ours / "host.key", theirs / "host.key")


def wait_for_event(agent: LabAgent, name: str, **values: object) -> float:
    """Wait for an event in the agent's log: how many seconds the wait took."""
    return wait_until(lambda: agent.events(name, **values), f"the agent logs {name} {values}")


def forget_domains(host: LabHost) -> None:
    """End and undefine all domains."""
    with contextlib.closing(host.connect()) as connection:
        for domain in connection.listAllDomains():
            is_persistent = domain.isPersistent()
            if domain.isActive():
                domain.destroy()
            if is_persistent:
                domain.undefine()


def secret_usages(host: LabHost) -> list[str]:
    """The usage IDs of our secrets in libvirt, sorted: libvirt lists them in any order."""
    with contextlib.closing(host.connect()) as connection:
        usages = [secret.usageID() for secret in connection.listAllSecrets()]
    return sorted(usage for usage in usages if usage.startswith("virt-sse:"))


class Site:
    """An initialised lab host with guests.

    :ivar agent: runs, unless a test stops the agent.
    """

    def __init__(self, host: LabHost, backend: Backend, agent: LabAgent, acceleration: Acceleration) -> None:
        self.host = host
        self.backend = backend
        self.agent = agent
        self._acceleration = acceleration

    def virt_sse(self, *arguments: str | Path, status: int = 0) -> str:
        """The output of a command on this host, which must exit with *status*."""
        done = run_command(arguments, self.host.environment)
        assert done.returncode == status, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    def guest(
        self, encryption_set: str | None = None, *, sku: DiskSku = DiskSku.PREMIUM_SSD
    ) -> tuple[Guest, Disk]:
        """A defined guest that runs until stopped, on a new disk."""
        name = f"t{uuid.uuid4().hex[:8]}"
        source = boot_sector_image(stays=True)
        disk = self.backend.transfer.import_image(
            NewDisk(name=name, sku=sku, encryption_set=encryption_set), source, source_format="raw"
        )
        element = self.backend.domains.disk_element(name)
        guest = Guest(self.host, name, acceleration=self._acceleration, disks=[element])
        guest.define()
        return guest, disk

    def refusal(self, guest: Guest) -> str:
        """The error of libvirt at a refused start."""
        try:
            guest.start()
        except libvirt.libvirtError as exc:
            return str(exc)
        raise AssertionError(f"{guest.name} has started")

    def secrets(self) -> list[str]:
        return secret_usages(self.host)

    def events(self, name: str, **values: object) -> list[dict[str, object]]:
        """The events in the agent's log with this name and these values."""
        return self.agent.events(name, **values)

    def wait_for_event(self, name: str, **values: object) -> float:
        """Wait for an event in the agent's log: how many seconds the wait took."""
        return wait_for_event(self.agent, name, **values)

    def wait_until_watched(self, guest: Guest) -> None:
        """Wait until the agent knows the guest as running and its keys as enabled."""

        def is_watched() -> bool:
            status = self.agent.status()
            seen = {domain["name"] for domain in status["domains"]}  # type: ignore[attr-defined]
            states = {key["state"] for key in status["keys"]}  # type: ignore[attr-defined]
            return guest.name in seen and states == {"enabled"}

        wait_until(is_watched, f"the agent watches {guest.name} with good keys")

    def forget_domains(self) -> None:
        forget_domains(self.host)


class CustomerSite(Site):
    """A lab host whose encryption sets have keys in a vault.

    :ivar keys: the administrator of the vault.
    """

    keys: CustomerKeys

    def use(self, keys: CustomerKeys) -> None:
        """Let this host make its sets' identities in the vault of *keys*."""
        self.keys = keys
        path = self.backend.host.config.operator_credential
        path.unlink(missing_ok=True)
        keys.administration.new_credential_file(
            path, f"host-{uuid.uuid4().hex[:8]}", role=Role.IDENTITY_OPERATOR
        )

    def new_set(
        self,
        *,
        action: RevocationAction = RevocationAction.SHUTDOWN,
        grace_seconds: int = 0,
        automatic_rotation: bool = False,
        placement: Placement | None = None,
    ) -> EncryptionSet:
        """A set with a new key, and with an identity that may use the key."""
        made = self.backend.sets.create(
            f"s{uuid.uuid4().hex[:8]}",
            provider="customer-managed",
            key=self.keys.new_key(),
            automatic_rotation=automatic_rotation,
            revocation=action,
            grace_seconds=grace_seconds,
            placement=placement,
        )
        self.grant(made)
        return made

    def grant(self, encryption_set: EncryptionSet) -> None:
        """Let a set's identity use keys."""
        assert encryption_set.identity
        self.keys.administration.set_permissions(encryption_set.identity, RIGHTS)

    def disable(self, disk: Disk) -> None:
        self.keys.enable(key_of(disk), enabled=False)

    def enable(self, disk: Disk) -> None:
        self.keys.enable(key_of(disk), enabled=True)

    @contextlib.contextmanager
    def using(self, vault: LabVault) -> Iterator[CustomerKeys]:
        """Make sets, their keys and identities in *vault*."""
        before = getattr(self, "keys", None)
        with CustomerKeys(vault, self.host.directory / f"identities-{uuid.uuid4().hex[:8]}") as keys:
            self.use(keys)
            try:
                yield keys
            finally:
                if before:
                    self.use(before)


@contextlib.contextmanager
def customer_site(
    host: LabHost, vault: LabVault, acceleration: Acceleration, config: str = CONFIG
) -> Iterator[CustomerSite]:
    """A lab host with an agent, for keys of *vault*."""
    with prepared(host, config) as backend, LabAgent(host) as agent:
        site = CustomerSite(host, backend, agent, acceleration)
        with site.using(vault):
            yield site


def key_of(disk: Disk) -> KeyId:
    """The key version that wraps the disk's DEK."""
    return disk.deks[0].wrapped.key

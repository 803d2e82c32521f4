"""What runs: libvirt's domains with a disk of ours, and libvirt's secrets that are ours."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

import libvirt

from virt_sse.agent.logs import fields
from virt_sse.errors import InvalidValueError, LibvirtError
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import BackupJob
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domains import gone_is_fine, running_backup
from virt_sse.libvirt.secret_name import PREFIX
from virt_sse.verification.chains import may_be_ours

_log = logging.getLogger(__name__)

PAUSED_NAMESPACE = "https://virt-sse.invalid/agent/1"
"""Of the element in a running domain's metadata that says that the agent has paused it: its key was gone."""

PLAINTEXT_NAMESPACE = "https://virt-sse.invalid/agent/plaintext/1"
"""Likewise, because data of its encrypted disks was in an image without encryption."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class RunningDomain:
    """A running domain with a disk of ours.

    :ivar run: libvirt's number of it, which no other run of the domain has.
    :ivar runs: whether its processors do, rather than stand still.
    :ivar paused_by_us: whether it was the agent that paused it, for its key.
    :ivar paused_for_plaintext: whether it was the agent that paused it, for an image without encryption.
    :ivar usages: usage ids of the libvirt secrets that the domain was started with.
    :ivar definition: the live definition.
    :ivar backup: a running backup of the domain.
    """

    uuid: UUID
    run: int
    name: str
    uses: tuple[DomainDisk, ...]
    runs: bool
    paused_by_us: bool
    usages: frozenset[str]
    definition: DomainDefinition = field(repr=False, compare=False)
    paused_for_plaintext: bool = False
    backup: BackupJob | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class InventorySnapshot:
    """What ran at one moment.

    :ivar number: counts the snapshots; 0 before the first.
    :ivar secrets: the usage ids of libvirt's secrets that are ours. Seen before the domains: the secrets of a
        domain that is listed may be missing here because it was just starting.
    :ivar time: of ``time.time()``.
    :ivar others: domains that have no disk of ours, and one that may have been.
    """

    number: int = 0
    domains: tuple[RunningDomain, ...] = ()
    secrets: frozenset[str] = frozenset()
    time: float = 0.0
    others: tuple[RunningDomain, ...] = ()


class Inventory:
    """Looks again and again, in a thread of its own.

    Of its own because libvirt does not list domains while a hook of one of them runs, and that may be waiting
    for a key vault; what was seen last stays to be had meanwhile, and while libvirt does not answer.

    :param seconds: between two looks.
    :param changed: called after each.
    """

    def __init__(self, uri: str, seconds: float, changed: Callable[[], None]) -> None:
        self._uri = uri
        self._seconds = seconds
        self._changed = changed
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="inventory", daemon=True)
        self._unclear: set[UUID] = set()
        self.snapshot = InventorySnapshot()
        self.connected: bool | None = None

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def refresh(self) -> None:
        """Look again now."""
        self._wake.set()

    def stop(self) -> None:
        """Look no more. A look that libvirt does not answer is not waited for."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while not self._stopping:
            try:
                with connected(self._uri) as connection:
                    self._set_connected(None)
                    pause = _FIRST_PAUSE
                    self._poll(connection)
            except (LibvirtError, libvirt.libvirtError) as exc:
                self._set_connected(exc)
                self._wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _poll(self, connection: libvirt.virConnect) -> None:
        while not self._stopping:
            secrets = frozenset(_our_secrets(connection))
            listed = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            seen = [found for domain in listed if (found := self._inspect(domain))]
            domains = tuple(each for each in seen if each.definition.mentions_us)
            others = tuple(each for each in seen if not each.definition.mentions_us)
            self.snapshot = InventorySnapshot(self.snapshot.number + 1, domains, secrets, time.time(), others)
            self._changed()
            self._wait(self._seconds)

    def _wait(self, seconds: float) -> None:
        self._wake.wait(seconds)
        if not self._stopping:
            self._wake.clear()

    def _set_connected(self, error: Exception | None) -> None:
        if error and self.connected is not False:
            _log.warning("libvirt-lost", extra=fields({"uri": self._uri, "reason": str(error)}))
        elif not error and not self.connected:
            _log.info("libvirt-connected", extra=fields({"uri": self._uri}))
        self.connected = error is None
        self._changed()

    def _inspect(self, domain: libvirt.virDomain) -> RunningDomain | None:
        """The domain, if it has a disk of ours and has not ended since it was listed."""
        uuid = UUID(bytes=domain.UUID())
        try:
            with gone_is_fine():
                xml = domain.XMLDesc()
                if PREFIX not in xml and not may_be_ours(xml):
                    return None
                definition = DomainDefinition.parse(xml)
                state, _ = domain.state()
                return RunningDomain(
                    uuid=uuid,
                    run=domain.ID(),
                    name=domain.name(),
                    uses=definition.our_disks,
                    runs=state != libvirt.VIR_DOMAIN_PAUSED,
                    paused_by_us=PAUSED_NAMESPACE in xml,
                    usages=frozenset(name.usage for name in definition.secrets),
                    definition=definition,
                    paused_for_plaintext=PLAINTEXT_NAMESPACE in xml,
                    backup=running_backup(domain),
                )
        except InvalidValueError as exc:
            if uuid not in self._unclear:
                self._unclear.add(uuid)
                _log.warning("domain-unclear", extra=fields({"domain": domain.name(), "reason": str(exc)}))
        return None


def _our_secrets(connection: libvirt.virConnect) -> list[str]:
    return [name for secret in connection.listAllSecrets() if (name := _usage_id(secret)).startswith(PREFIX)]


def _usage_id(secret: libvirt.virSecret) -> str:
    return str(secret.usageID() or "")

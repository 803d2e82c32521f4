"""Inventory of running domains with virt-sse disks, and of virt-sse's libvirt secrets."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import UUID

import libvirt

from virt_sse.agent.libvirt_events import LibvirtEvents
from virt_sse.agent.logs import fields
from virt_sse.domains.keyless_images import plain_paths
from virt_sse.errors import LibvirtError
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.disk_chains import BackupJob
from virt_sse.libvirt.disk_element import DomainDisk
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.domains import gone_is_fine, leaves, salvaged_backup
from virt_sse.libvirt.pools import volume_path
from virt_sse.libvirt.secret_name import PREFIX, SecretName
from virt_sse.store.image_paths import ImagePaths
from virt_sse.verification.chains import may_be_ours

_log = logging.getLogger(__name__)

PAUSED_NAMESPACE = "https://virt-sse.invalid/agent/1"
"""Namespace of the metadata element of a running domain paused by the agent because of a revoked key."""

PLAINTEXT_NAMESPACE = "https://virt-sse.invalid/agent/plaintext/1"
"""Likewise, because of a plaintext image with data of the domain's encrypted disks."""

_KNOWN_AFTER_END = 60.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class RunningDomain:
    """A running domain with a virt-sse disk.

    :ivar run: libvirt's id of the running domain, unique to the run.
    :ivar runs: whether the virtual processors run, i.e. the domain is not paused.
    :ivar leaves: whether the domain is paused because it migrates.
    :ivar has_guest: whether the guest is there, and its state is not to come from another host or a file.
    :ivar paused_for_key: whether the agent has paused the domain because of a revoked key.
    :ivar paused_for_plaintext: whether the agent has paused the domain because of a plaintext image.
    :ivar usages: usage ids of the libvirt secrets named in the domain at its start.
    :ivar definition: the live definition.
    :ivar backup: a running backup of the domain.
    :ivar plain_files: files to which the domain may write without encryption; by path, the disk's name in the
        guest. Only of a domain that names an image of the store.
    """

    uuid: UUID
    run: int
    name: str
    uses: tuple[DomainDisk, ...]
    runs: bool
    paused_for_key: bool
    usages: frozenset[str]
    definition: DomainDefinition = field(repr=False, compare=False)
    paused_for_plaintext: bool = False
    backup: BackupJob | None = field(default=None, repr=False, compare=False)
    plain_files: Mapping[Path, str] = field(default_factory=dict, repr=False, compare=False)
    leaves: bool = False
    has_guest: bool = True


@dataclass(frozen=True, slots=True)
class InventorySnapshot:
    """The running domains and the secrets at a point in time.

    :ivar number: counts the snapshots; 0 before the first.
    :ivar secrets: usage ids of virt-sse's libvirt secrets. Listed before the domains: the secrets of a domain
        that was just starting may be missing.
    :ivar time: of ``time.time()``.
    :ivar others: domains without virt-sse disks, but with a disk whose serial number may be a virt-sse
        disk's, or with the image of a virt-sse disk.
    :ivar unreadable: number of skipped parts: malformed references to our secrets, unreadable definitions,
        secrets with a malformed usage id, domains that could not be inspected.
    """

    number: int = 0
    domains: tuple[RunningDomain, ...] = ()
    secrets: frozenset[str] = frozenset()
    time: float = 0.0
    others: tuple[RunningDomain, ...] = ()
    unreadable: int = 0


class Inventory:
    """Polls libvirt in a separate thread.

    A separate thread, because libvirt lists no domains while the hook of any domain runs, and the hook may
    wait for a key vault. The last snapshot stays available meanwhile, and while libvirt does not answer.

    :param seconds: interval between polls.
    :param changed: called after each poll.
    :param image_paths: the paths of the store's images.
    :param events: registered at each connection.
    """

    def __init__(
        self,
        uri: str,
        seconds: float,
        changed: Callable[[], None],
        image_paths: ImagePaths,
        events: LibvirtEvents | None = None,
    ) -> None:
        self._uri = uri
        self._image_paths = image_paths
        self._events = events
        self._seconds = seconds
        self._changed = changed
        self._wake = threading.Event()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="inventory", daemon=True)
        self._unclear: set[tuple[UUID, str]] = set()
        self._unreadable = 0
        self.snapshot = InventorySnapshot()
        self._ended: dict[UUID, tuple[float, RunningDomain]] = {}
        self.connected: bool | None = None

    def start(self) -> None:
        """Start polling."""
        self._thread.start()

    def refresh(self) -> None:
        """Poll again now."""
        self._wake.set()

    def stop(self) -> None:
        """Stop polling, without waiting for an unanswered poll."""
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
            except Exception:  # noqa: BLE001 -- an unexpected failure must not end the watch
                _log.exception("inventory-failed")
                self._wait(_LONGEST_PAUSE)

    def _poll(self, connection: libvirt.virConnect) -> None:
        if self._events:
            self._events.register(connection)
        while not self._stopping:
            self._take(connection)
            self._changed()
            self._wait(self._seconds)

    def _take(self, connection: libvirt.virConnect) -> None:
        """Take a snapshot. What cannot be read is skipped part by part, and counted: nothing fails open."""
        self._unreadable = 0
        secrets = frozenset(self._our_secrets(connection))
        listed = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        seen = [found for domain in listed if (found := self._try_inspect(domain))]
        domains = tuple(each for each in seen if each.definition.mentions_us)
        others = tuple(each for each in seen if not each.definition.mentions_us)
        self._note_ended({each.uuid for each in seen})
        self.snapshot = InventorySnapshot(
            self.snapshot.number + 1, domains, secrets, time.time(), others, self._unreadable
        )

    def _note_ended(self, running: set[UUID]) -> None:
        now = time.monotonic()
        kept = {uuid: ended for uuid, ended in self._ended.items() if now - ended[0] < _KNOWN_AFTER_END}
        before = (*self.snapshot.domains, *self.snapshot.others)
        self._ended = kept | {each.uuid: (now, each) for each in before if each.uuid not in running}

    def known(self, domain_id: UUID) -> RunningDomain | None:
        """A domain of the last snapshot, or one that ended in the last minute: events come in any order."""
        snapshot, ended = self.snapshot, self._ended.get(domain_id)
        running = (each for each in (*snapshot.domains, *snapshot.others) if each.uuid == domain_id)
        return next(running, ended[1] if ended else None)

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

    def _try_inspect(self, domain: libvirt.virDomain) -> RunningDomain | None:
        """As :meth:`_inspect`; after a failure, the domain of the snapshot before, if known.

        :raise libvirt.libvirtError: When the connection to libvirt is lost.
        """
        try:
            return self._inspect(domain)
        except Exception as exc:
            if isinstance(exc, libvirt.libvirtError) and not domain.connect().isAlive():
                raise
            uuid = UUID(bytes=domain.UUID())
            self._unreadable += 1
            if (uuid, "") not in self._unclear:
                self._unclear.add((uuid, ""))
                _log.exception("domain-unclear", extra=fields({"domain": domain.name()}))
            run = domain.ID()
            before = (*self.snapshot.domains, *self.snapshot.others)
            return next((each for each in before if (each.uuid, each.run) == (uuid, run)), None)

    def _inspect(self, domain: libvirt.virDomain) -> RunningDomain | None:
        """The domain if it may have a virt-sse disk and still exists, else ``None``."""
        with gone_is_fine():
            xml = domain.XMLDesc()
            names_image = self._image_paths.mentioned(xml)
            if PREFIX not in xml and not may_be_ours(xml) and not names_image:
                return None
            definition = DomainDefinition.salvage(xml)
            state, reason = domain.state()
            is_paused = state == libvirt.VIR_DOMAIN_PAUSED
            backup, left_out = salvaged_backup(domain)
            files = (
                plain_paths(definition, backup, volume=partial(_volume, domain.connect()))
                if names_image
                else {}
            )
            found = RunningDomain(
                uuid=UUID(bytes=domain.UUID()),
                run=domain.ID(),
                name=domain.name(),
                uses=definition.our_disks,
                runs=not is_paused,
                paused_for_key=PAUSED_NAMESPACE in xml,
                usages=frozenset(name.usage for name in definition.secrets),
                definition=definition,
                paused_for_plaintext=PLAINTEXT_NAMESPACE in xml,
                backup=backup,
                plain_files=files,
                leaves=leaves(domain),
                has_guest=reason == libvirt.VIR_DOMAIN_PAUSED_USER
                if is_paused
                else state == libvirt.VIR_DOMAIN_RUNNING,
            )
            self._report_unreadable(found, [*definition.unreadable, *left_out])
            return found
        return None

    def _report_unreadable(self, domain: RunningDomain, parts: Sequence[str]) -> None:
        """Count skipped parts, and log each once."""
        self._unreadable += len(parts)
        for part in parts:
            if (domain.uuid, part) not in self._unclear:
                self._unclear.add((domain.uuid, part))
                details = {"domain": domain.name, "reason": f"cannot be read: {part[:200]!r}"}
                _log.warning("domain-unclear", extra=fields(details))

    def _our_secrets(self, connection: libvirt.virConnect) -> Iterator[str]:
        """The usage ids of our secrets, without malformed usage ids."""
        for secret in connection.listAllSecrets():
            usage = _usage_id(secret)
            try:
                if SecretName.parse(usage):
                    yield usage
            except ValueError:
                self._unreadable += 1


def _volume(connection: libvirt.virConnect, pool: str, name: str) -> Path | None:
    try:
        return volume_path(connection, pool, name)
    except libvirt.libvirtError:
        if not connection.isAlive():
            raise
        return None


def _usage_id(secret: libvirt.virSecret) -> str:
    return str(secret.usageID() or "")

"""The agent as a whole: start, watch loop, hook events, status and stop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

import virt_sse
from virt_sse.agent.automatic_rotation import AutomaticRotation
from virt_sse.agent.deferred_start import DeferredStart
from virt_sse.agent.hand_over_watch import HandOverWatch
from virt_sse.agent.image_watch import ImageWatch
from virt_sse.agent.inventory import Inventory
from virt_sse.agent.job_watch import JobWatch
from virt_sse.agent.key_status import KeyStatusLookup
from virt_sse.agent.key_watch import KeyWatch
from virt_sse.agent.lease_watch import LeaseWatch
from virt_sse.agent.libvirt_events import LibvirtEvents, start_loop
from virt_sse.agent.listener import listening
from virt_sse.agent.logs import fields
from virt_sse.agent.metrics import Metrics
from virt_sse.agent.page_service import PageService
from virt_sse.agent.plaintext_watch import PlaintextWatch
from virt_sse.agent.protection_watch import ProtectionWatch
from virt_sse.agent.purge_watch import PurgeWatch
from virt_sse.agent.received_watch import ReceivedWatch
from virt_sse.agent.replacement_watch import ReplacementWatch
from virt_sse.agent.revocation import Enforcement, Revocation, RevokedDisk, spared_skus, strictest_enforcement
from virt_sse.agent.secret_watch import SecretWatch
from virt_sse.agent.server import AgentServer, AgentService
from virt_sse.agent.size_watch import SizeWatch
from virt_sse.agent.stage_watch import StageWatch
from virt_sse.audit.record import Component
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains import temp_disks
from virt_sse.domains.data_on_host import SAVED_MEMORY
from virt_sse.domains.incoming import IncomingDomains
from virt_sse.domains.received_disks import ReceivedDisks
from virt_sse.domains.release import release
from virt_sse.errors import InvalidValueError, VirtSseError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disks import Disk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.keys import KeyState
from virt_sse.plugins import PluginHost

if TYPE_CHECKING:
    from virt_sse.page.overview import OverviewCollector

_log = logging.getLogger(__name__)

_UNUSED_POLLS = 5
"""Number of polls during which a secret or a stage must be unused before removal."""

_IMAGE_POLLS = 15
"""Number of polls between two looks at the folders of images, and at the deleted disks."""

_PROTECTION_POLLS = 5
"""Number of polls between two looks at the protected domains."""

_START_SECONDS = 10.0
"""Time for a domain to start after its stages."""


class Agent:
    """Watches in its own threads between :meth:`start` and :meth:`stop`, and serves hook events meanwhile.

    :param backend: opened with :attr:`Component.AGENT`, for the audit log. The caller closes the backend.
    """

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        config = self._config = backend.host.config
        self._backend = backend
        self._metrics = metrics
        self._began = time.time()
        self._stopping = False
        self._wake = threading.Event()
        seconds = config.agent.poll_seconds
        self._inventory = Inventory(
            config.libvirt_uri,
            seconds,
            self._wake.set,
            backend.host.image_paths,
            LibvirtEvents(
                self._on_job, self._on_saved, self._on_dumped, self._on_connected, self._on_migration
            ),
        )
        self._keys = KeyWatch(
            backend, poll_seconds=seconds, probe_seconds=config.agent.probe_seconds, changed=self._wake.set
        )
        self._key_status = KeyStatusLookup(backend, self._keys)
        self._spared = spared_skus(backend.host.plugins)
        self._revocation = Revocation(
            config.libvirt_uri, backend.host.stages, metrics, self._inventory.refresh, self._spared
        )
        self._secrets = SecretWatch(
            config.libvirt_uri, backend.domains, metrics, unused_seconds=_UNUSED_POLLS * seconds
        )
        self._stages = StageWatch(
            config.libvirt_uri,
            backend.host.stages,
            backend.domains,
            metrics,
            unused_seconds=max(_START_SECONDS, _UNUSED_POLLS * seconds),
        )
        self._hand_overs = HandOverWatch(config.libvirt_uri, backend.host.stages, backend.domains)
        self._plaintext = PlaintextWatch(backend, metrics)
        self._jobs = JobWatch(backend, metrics, self._poll_jobs)
        self._sizes = SizeWatch(backend, self._jobs.has_jobs)
        self._images = ImageWatch(backend, metrics, _IMAGE_POLLS * seconds)
        self._copies = ReplacementWatch(backend, metrics)
        self._deferred = DeferredStart(config, metrics)
        self._leases = LeaseWatch(backend.host.leases)
        self._received = ReceivedWatch(ReceivedDisks(backend.host))
        self._protection = ProtectionWatch(backend.host, _PROTECTION_POLLS * seconds)
        self._purges = PurgeWatch(backend.soft_deletion, metrics, _IMAGE_POLLS * seconds)
        self._rotation = AutomaticRotation(backend, metrics, config.agent.rotation_seconds)
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._page = PageService(config, self._page_collector)

    def start(self) -> None:
        """Start watching."""
        self._inventory.start()
        self._thread.start()
        self._rotation.start()
        self._purges.start()
        self._page.start()

    def stop(self) -> None:
        """Stop watching; actions on domains under way are completed first."""
        self._stopping = True
        self._wake.set()
        self._page.stop()
        self._rotation.stop()
        self._purges.stop()
        self._inventory.stop()
        self._thread.join()
        self._revocation.stop()
        self._secrets.stop()
        self._stages.stop()
        self._hand_overs.stop()
        self._plaintext.stop()
        self._sizes.stop()
        self._images.stop()
        self._copies.stop()
        self._deferred.stop()
        self._received.stop()
        self._protection.stop()
        self._keys.stop()

    def serve_hook(self, event: str, domain: str, xml: str) -> str | None:
        """Serve an event of the libvirt hook, with the same effect as the hook without an agent.

        :param domain: name of the domain; the definition in *xml* has the same name.
        :return: the definition for libvirt; ``None`` for the present one.
        :raise VirtSseError: By meaning. The domain must not start in this case.
        """
        with self._metrics.hook(event):
            # A malformed reference refuses a start only: an end must not leave processes behind.
            is_strict = event in ("migrate", "prepare", "started")
            definition = DomainDefinition.parse(xml) if is_strict else DomainDefinition.salvage(xml)
            if event == "release":
                self._leases.note_end(definition.uuid, self._inventory.snapshot.number)
                release(self._config, definition)
            elif event == "migrate":
                return self._backend.domains.announce(definition)
            elif event == "started":
                IncomingDomains(self._config).check_started(definition)
            elif event == "prepare":
                self._backend.domains.prepare(definition)
            else:
                self._backend.domains.reconnect(definition)
        self._inventory.refresh()
        return None

    def _on_job(self, domain_id: UUID, job: str, status: str) -> None:
        self._jobs.changed(domain_id, job, status)

    def _on_connected(self) -> None:
        self._jobs.forget()

    def _on_migration(self, domain_id: UUID, status: str) -> None:
        self._hand_overs.migrated(domain_id, status)

    def _on_saved(self, domain_id: UUID) -> None:
        self._report_memory("memory-saved", domain_id)

    def _on_dumped(self, domain_id: UUID) -> None:
        self._report_memory("memory-dumped", domain_id)

    def _report_memory(self, event: str, domain_id: UUID) -> None:
        """Report a file with the memory, in plaintext, of a domain with encryption at host."""
        domain = self._inventory.known(domain_id)
        if domain and _has_encryption_at_host(domain.definition):
            _log.warning(event, extra=fields({"domain": domain.name, "reason": SAVED_MEMORY}))

    def _poll_jobs(self) -> None:
        self._inventory.refresh()
        self._images.soon()

    def status(self) -> Mapping[str, object]:
        """The agent's view of domains and keys, for JSON."""
        snapshot = self._inventory.snapshot
        return {
            "version": virt_sse.__version__,
            "pid": os.getpid(),
            "began": _moment(self._began),
            "libvirt": self._config.libvirt_uri,
            "libvirt-connected": bool(self._inventory.connected),
            "last-look": _moment(snapshot.time) if snapshot.number else None,
            "poll-seconds": self._config.agent.poll_seconds,
            "domains": [
                {
                    "name": domain.name,
                    "disks": len({use.disk_id for use in domain.uses}),
                    "revoked": self._revocation.reason(domain),
                    "paused": domain.paused_for_key or domain.paused_for_plaintext,
                    "plaintext": self._plaintext.links(domain),
                }
                for domain in snapshot.domains
            ],
            "keys": [
                {
                    "key": str(watched.key),
                    "encryption-set": str(watched.set_id) if watched.set_id else None,
                    "state": state.value,
                }
                for watched, state in self._keys.states()
            ],
        }

    def enforcement(self, disks: Sequence[tuple[Disk, EncryptionSet | None]]) -> Enforcement:
        """What would be done with a running domain if the key of *disks*, each with its set, were revoked."""
        revoked = [RevokedDisk(disk, encryption_set, "") for disk, encryption_set in disks]
        return strictest_enforcement(revoked, self._spared)

    def _page_collector(self) -> OverviewCollector:
        from virt_sse.page.overview import AgentView, OverviewCollector

        def enforcement(disks: Sequence[tuple[Disk, EncryptionSet | None]]) -> tuple[str, int]:
            wanted = self.enforcement(disks)
            return wanted.action.value, wanted.grace_seconds

        view = AgentView(self.status, self._backend.domains.plan, enforcement)
        return OverviewCollector(self._backend.host, view)

    def _watch(self) -> None:
        try:
            self._backend.recover()
        except Exception:  # noqa: BLE001 -- the watches and the next command try again
            _log.exception("watch-failed")
        while not self._stopping:
            self._wake.clear()
            due = time.monotonic() + self._config.agent.poll_seconds
            try:
                due = min(due, self._watch_once())
            except VirtSseError as exc:
                _log.warning("watch-failed", extra=fields({"reason": str(exc)}))
            except Exception:  # noqa: BLE001 -- an unexpected failure must not end the watch
                _log.exception("watch-failed")
            self._wake.wait(max(0.0, due - time.monotonic()))

    def _watch_once(self) -> float:
        """Start all due actions; return when to call again, in ``time.monotonic()``.

        :raise StoreError: When the store cannot be queried.
        """
        snapshot = self._inventory.snapshot
        report = self._key_status.of(snapshot)
        due = self._keys.watch(report.probe_deks)
        grace_end = self._revocation.apply(report.domains)
        self._leases.keep(snapshot, is_current=bool(self._inventory.connected and snapshot.number))
        if self._inventory.connected:
            self._received.keep(snapshot)
            self._secrets.keep(snapshot, lambda domain: self._revocation.reason(domain) is not None)
            self._stages.keep(snapshot)
            self._hand_overs.keep(snapshot)
            revoked = {domain.uuid for domain in snapshot.domains if self._revocation.reason(domain)}
            self._plaintext.keep(snapshot, revoked)
            self._jobs.keep(snapshot)
            self._sizes.keep(snapshot)
            self._images.keep(snapshot)
            self._copies.keep()
            self._deferred.keep(snapshot)
            self._protection.keep(snapshot)
            running = {domain.uuid for domain in snapshot.domains}
            temp_disks.erase_unused(self._config, running, before=snapshot.time - temp_disks.SETTLED_SECONDS)
            self._backend.resume_guests()
        states = self._keys.states()
        self._metrics.libvirt_connected.set(bool(self._inventory.connected))
        self._metrics.domains.set(len(snapshot.domains))
        self._metrics.unreadable.set(snapshot.unreadable)
        self._metrics.show_keys([(str(w.key), str(w.set_id or ""), state) for w, state in states])
        silent = any(state is KeyState.UNREACHABLE for _, state in states)
        if self._inventory.connected and snapshot.number and not silent:
            self._metrics.last_watch.set(snapshot.time)
        return min(due, grace_end) if grace_end is not None and grace_end > time.monotonic() else due


def run(config: Config, plugins: PluginHost) -> None:
    """Run this host's agent until SIGTERM or SIGINT; requests under way are answered first.

    :raise AgentError: When an agent is already running, or the socket cannot be created.
    :raise VirtSseError: When the backend cannot be opened.
    """
    start_loop()
    metrics = Metrics()
    plugins.register(metrics, "virt-sse-agent")
    with (
        _stop_signal() as stopped,
        listening(config.agent_socket) as listener,
        # libvirt may wait for a hook that waits for this socket: nothing here may wait for libvirt.
        Backend(config, plugins, component=Component.AGENT, in_hook=True) as backend,
    ):
        agent = Agent(backend, metrics)
        server = AgentServer(listener, AgentService(agent.serve_hook, agent.status, metrics.render))
        serving = threading.Thread(target=server.serve_forever, args=(0.1,), name="server")
        agent.start()
        serving.start()
        _log.info("listening", extra=fields({"socket": str(config.agent_socket), "pid": os.getpid()}))
        _notify("READY=1")
        try:
            os.read(stopped, 1)
        finally:
            _notify("STOPPING=1")
            _log.info("stopping")
            server.shutdown()
            serving.join()
            server.server_close()
            agent.stop()
    _log.info("stopped")


@contextlib.contextmanager
def _stop_signal() -> Iterator[int]:
    """A descriptor to read from until SIGTERM or SIGINT: a read returns after the signal.

    The interpreter's C handler writes to the descriptor in any thread (:func:`signal.set_wakeup_fd`). A
    Python handler would not run, because the main thread blocks in the read.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    signal.set_wakeup_fd(writable)
    try:
        yield readable
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(readable)
        os.close(writable)


def _notify(state: str) -> None:
    """Notify the service manager, if present (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect("\0" + address[1:] if address[0] == "@" else address)
            connection.sendall(state.encode())


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _has_encryption_at_host(definition: DomainDefinition) -> bool:
    try:
        return definition.has_encryption_at_host
    except InvalidValueError:
        return True

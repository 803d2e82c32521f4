"""Events of libvirt and of QEMU: block jobs, saved states and dumps, known at once, not at the next poll."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

import libvirt
import libvirt_qemu

_log = logging.getLogger(__name__)

_LOOP_MILLISECONDS = 1000

JobEvent = Callable[[UUID, str, str], None]
"""Takes a domain's UUID, the id of a QEMU job, and the job's new status (QEMU ``JobStatus``)."""
MemoryEvent = Callable[[UUID], None]
MigrationEvent = Callable[[UUID, str], None]
"""Takes a domain's UUID, and the new status of its migration (QEMU ``MigrationStatus``)."""


def start_loop() -> None:
    """Run libvirt's event loop in a thread of its own. Only connections opened later have events."""
    libvirt.virEventRegisterDefaultImpl()
    libvirt.virEventAddTimeout(_LOOP_MILLISECONDS, lambda *_: None, None)
    threading.Thread(target=_loop, name="libvirt-events", daemon=True).start()


def _loop() -> None:
    while True:
        try:
            libvirt.virEventRunDefaultImpl()
        except libvirt.libvirtError:  # the loop itself goes on
            _log.exception("libvirt-events-failed")


class LibvirtEvents:
    """Registers for events; the callbacks run in the thread of the loop, and must not call libvirt.

    :param job: called when a job of QEMU changes its status.
    :param dumped: called when ``dump`` has written a domain's memory.
    :param connected: called before the events of a new connection: earlier events may be lost.
    :param saved: called when a domain has ended because its state was saved, by ``save`` or ``managedsave``.
    :param migration: called when the migration of a domain, to or from this host, changes its status.
    """

    def __init__(
        self,
        job: JobEvent,
        saved: MemoryEvent,
        dumped: MemoryEvent,
        connected: Callable[[], None],
        migration: MigrationEvent,
    ) -> None:
        self._job = job
        self._connected = connected
        self._saved = saved
        self._dumped = dumped
        self._migration = migration

    def register(self, connection: libvirt.virConnect) -> None:
        """Register for the events of all domains, until the connection is closed.

        A libvirt without such events, e.g. its test driver, is polled only.
        """
        self._connected()
        try:
            # 'dump --memory-only' is a command of QEMU; 'dump' is a migration to a file, a job of libvirt.
            for name, handler in (
                ("JOB_STATUS_CHANGE", self._on_job),
                ("DUMP_COMPLETED", self._on_memory_only_dump),
                ("MIGRATION", self._on_migration),
            ):
                libvirt_qemu.qemuMonitorEventRegister(connection, None, name, handler, None)
            for event, callback in (
                (libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle),
                (libvirt.VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, self._on_libvirt_job),
            ):
                connection.domainEventRegisterAny(None, event, callback, None)
        except libvirt.libvirtError as exc:
            _log.warning("libvirt reports no events: %s", exc)

    def _on_job(self, _connection: libvirt.virConnect, domain: libvirt.virDomain, *event: object) -> None:
        if change := _fields(event, "id", "status"):
            self._job(UUID(bytes=domain.UUID()), *change)

    def _on_memory_only_dump(
        self, _connection: libvirt.virConnect, domain: libvirt.virDomain, *_details: object
    ) -> None:
        self._dumped(UUID(bytes=domain.UUID()))

    def _on_libvirt_job(
        self,
        _connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        values: Mapping[str, object],
        _opaque: Any,
    ) -> None:
        if values.get(libvirt.VIR_DOMAIN_JOB_OPERATION) == libvirt.VIR_DOMAIN_JOB_OPERATION_DUMP:
            self._dumped(UUID(bytes=domain.UUID()))

    def _on_migration(
        self, _connection: libvirt.virConnect, domain: libvirt.virDomain, *event: object
    ) -> None:
        if change := _fields(event, "status"):
            self._migration(UUID(bytes=domain.UUID()), *change)

    def _on_lifecycle(
        self,
        _connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        event: int,
        detail: int,
        _opaque: Any,
    ) -> None:
        if (event, detail) == (libvirt.VIR_DOMAIN_EVENT_STOPPED, libvirt.VIR_DOMAIN_EVENT_STOPPED_SAVED):
            self._saved(UUID(bytes=domain.UUID()))


def _fields(event: Sequence[object], *names: str) -> list[str]:
    """Fields of an event of QEMU; none of an event in an unknown format, which is logged.

    :param event: name, seconds, microseconds, details in JSON, and the opaque value of libvirt's callback.
    """
    name, _, _, details, _ = event
    try:
        found = json.loads(str(details))
        return [str(found[each]) for each in names]
    except (ValueError, KeyError, TypeError, RecursionError):
        _log.warning("QEMU reports %s in an unknown format", name)
        return []

"""Events of libvirt and of QEMU: block jobs and saved states, known at once instead of at the next poll."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from typing import Any
from uuid import UUID

import libvirt
import libvirt_qemu

_log = logging.getLogger(__name__)

_LOOP_MILLISECONDS = 1000

JobEvent = Callable[[UUID, str, str], None]
"""Takes a domain's UUID, the id of a QEMU job, and the job's new status (QEMU ``JobStatus``)."""
SaveEvent = Callable[[UUID], None]


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
    :param saved: called when a domain has ended because its state was saved, by ``save`` or ``managedsave``.
    """

    def __init__(self, job: JobEvent, saved: SaveEvent) -> None:
        self._job = job
        self._saved = saved

    def register(self, connection: libvirt.virConnect) -> None:
        """Register for the events of all domains, until the connection is closed.

        A libvirt without such events, e.g. its test driver, is polled only.
        """
        try:
            libvirt_qemu.qemuMonitorEventRegister(
                connection,
                None,
                "JOB_STATUS_CHANGE",
                self._on_job,
                None,
            )
            connection.domainEventRegisterAny(
                None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, self._on_lifecycle, None
            )
        except libvirt.libvirtError as exc:
            _log.warning("libvirt reports no events: %s", exc)

    def _on_job(
        self,
        _connection: libvirt.virConnect,
        domain: libvirt.virDomain,
        _event: str,
        _seconds: int,
        _microseconds: int,
        details: str,
        _opaque: Any,
    ) -> None:
        try:
            change = json.loads(details)
            self._job(UUID(bytes=domain.UUID()), str(change["id"]), str(change["status"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            _log.warning("QEMU reports a job in an unknown format")

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

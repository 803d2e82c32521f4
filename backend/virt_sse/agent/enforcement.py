"""Enforcement actions on running domains. Each action opens a separate connection to libvirt.

Each function returns whether the action was done; after the end of a run, no action is needed. Domains are
looked up by UUID, because libvirt's other lookups wait for all domains with a running hook.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import libvirt

from virt_sse.agent.inventory import PAUSED_NAMESPACE, PLAINTEXT_NAMESPACE, RunningDomain
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.domains import gone_is_fine
from virt_sse.libvirt.secrets import drop_secret

_RESUMES, _RESUME_PAUSE = 5, 0.3
_MARK, _PREFIX = "<paused/>", "virt-sse"
_MARKS = (PAUSED_NAMESPACE, PLAINTEXT_NAMESPACE)
"""Reasons of a pause. A domain paused for both reasons resumes once neither applies."""


def request_shutdown(uri: str, domain: RunningDomain) -> bool:
    """Press the domain's ACPI power button; the guest may ignore the request.

    :raise LibvirtError: When libvirt refuses.
    """
    with _run(uri, domain) as found:
        if found is None:
            return False
        found.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        return True
    return False


def destroy(uri: str, domain: RunningDomain) -> bool:
    """End the domain immediately, and drop its secrets.

    :raise LibvirtError: When libvirt refuses.
    """
    done = False
    with _run(uri, domain) as found:
        if found is not None:
            found.destroy()
            done = True
    drop_secrets(uri, domain)
    return done


def pause(uri: str, domain: RunningDomain, why: str = PAUSED_NAMESPACE) -> bool:
    """Pause the domain, with a mark in its metadata.

    :param why: the mark's namespace: the reason.
    :raise LibvirtError: When libvirt refuses.
    """
    with _run(uri, domain) as found:
        if found is None or found.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            return False
        _mark(found, _MARK, why)
        found.suspend()
        return True
    return False


def resume(uri: str, domain: RunningDomain, why: str = PAUSED_NAMESPACE) -> bool:
    """Remove the mark, and resume the domain if paused and without a mark for a different reason.

    :param why: the mark's namespace: the reason.
    :raise LibvirtError: When libvirt refuses.
    """
    with _run(uri, domain) as found:
        if found is None:
            return False
        paused = found.state()[0] == libvirt.VIR_DOMAIN_PAUSED
        xml = found.XMLDesc()
        if any(other in xml for other in _MARKS if other != why):
            paused = False
        if paused:
            found.resume()
        _mark(found, None, why)
        return bool(paused)
    return False


def resume_after_error(uri: str, domain: RunningDomain) -> bool:
    """Resume a domain paused by QEMU for an I/O error with a repaired cause; whether the domain resumed.

    QEMU then retries the failed requests. Several resumes may be necessary: a first request detects the dead
    connection, a second reconnects, and each failed request pauses the domain again.

    :raise LibvirtError: When libvirt refuses.
    """
    resumed = False
    for _ in range(_RESUMES):
        time.sleep(_RESUME_PAUSE)
        with _run(uri, domain) as found:
            if found is None or any(mark in found.XMLDesc() for mark in _MARKS):
                return False
            if found.state() != [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR]:
                return resumed
            found.resume()
            resumed = True
    return False


def drop_secrets(uri: str, domain: RunningDomain) -> bool:
    """Remove the DEKs of the domain's disks from libvirt; QEMU keeps the DEKs and runs on.

    :raise LibvirtError: When libvirt refuses.
    """
    with connected(uri) as connection:
        for use in domain.uses:
            if use.secret:
                drop_secret(connection, use.secret)
    return True


def _mark(found: libvirt.virDomain, mark: str | None, why: str) -> None:
    """Set or remove a mark in the live definition only: marks survive the agent and end with the run."""
    found.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, mark, _PREFIX, why, libvirt.VIR_DOMAIN_AFFECT_LIVE)


@contextlib.contextmanager
def _run(uri: str, domain: RunningDomain) -> Iterator[libvirt.virDomain | None]:
    """The domain if still in the same run, else ``None``; errors at the end of a run are ignored."""
    with connected(uri) as connection, gone_is_fine(or_ended=True):
        found = connection.lookupByUUID(domain.uuid.bytes)
        yield found if found.ID() == domain.run else None

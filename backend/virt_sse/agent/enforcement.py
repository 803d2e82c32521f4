"""What can be done to a running domain, each in a connection of its own.

Each says whether it was done: a domain whose run has ended needs nothing any more. Domains are found by UUID:
to find one by anything else libvirt waits for those whose hooks run.
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
"""By why a domain was paused. It may be for both, and then goes on when neither holds."""


def ask_to_shut_down(uri: str, domain: RunningDomain) -> bool:
    """Press its power button, as ACPI has one; the guest may take no notice.

    :raise LibvirtError: When libvirt refuses.
    """
    with _run(uri, domain) as found:
        if found is None:
            return False
        found.shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN)
        return True
    return False


def destroy(uri: str, domain: RunningDomain) -> bool:
    """Pull its plug, and take its secrets away.

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
    """Stop its processors, with a mark that it was us.

    :param why: the mark's namespace.
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
    """Let it go on, if it was us who paused it, for no other reason, and it stands still.

    :param why: the mark's namespace.
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
    """Let it go on, if QEMU has paused it for an I/O error whose cause is gone; whether it went on.

    QEMU tries the failed requests again then. It first has to find that the connection is dead, and to
    connect again: that takes a request each, and so a pause each.

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
    """Take the DEKs of its disks back from libvirt; QEMU has them, and runs on.

    :raise LibvirtError: When libvirt refuses.
    """
    with connected(uri) as connection:
        for use in domain.uses:
            drop_secret(connection, use.secret)
    return True


def _mark(found: libvirt.virDomain, mark: str | None, why: str) -> None:
    """In its live definition alone, so that the mark ends with the run, and outlives the agent."""
    found.setMetadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, mark, _PREFIX, why, libvirt.VIR_DOMAIN_AFFECT_LIVE)


@contextlib.contextmanager
def _run(uri: str, domain: RunningDomain) -> Iterator[libvirt.virDomain | None]:
    """The domain, if it still is in that run; that it ends meanwhile is no error."""
    with connected(uri) as connection, gone_is_fine(or_ended=True):
        found = connection.lookupByUUID(domain.uuid.bytes)
        yield found if found.ID() == domain.run else None

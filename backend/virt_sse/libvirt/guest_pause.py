"""A short pause of a guest: processors stopped, file systems frozen by the guest agent if present."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import libvirt

from virt_sse.libvirt import domains

_log = logging.getLogger(__name__)

_AGENT = "org.qemu.guest_agent.0"


def has_agent(domain: libvirt.virDomain) -> bool:
    """Whether the guest agent is connected.

    :raise libvirt.libvirtError: When libvirt fails.
    """
    return domains.definition(domain).has_connected_channel(_AGENT)


@contextlib.contextmanager
def paused(domain: libvirt.virDomain, *, quiesce: bool | None) -> Iterator[None]:
    """Pause the guest during the block: no write is under way. A paused guest stays paused.

    :param quiesce: freeze the file systems: ``None`` if an agent is connected, ``True`` always, ``False``
        never.
    :raise libvirt.libvirtError: When libvirt refuses.
    """
    with contextlib.ExitStack() as undo:
        if _is_paused(domain):
            yield
            return
        if _frozen(domain, quiesce=quiesce):
            undo.callback(_thaw, domain)
        undo.callback(_resume, domain)
        domain.suspend()
        yield


def end_pause(domain: libvirt.virDomain) -> None:
    """End a pause left behind by a killed process.

    :raise libvirt.libvirtError: When libvirt refuses.
    """
    _resume(domain)
    if domains.is_active(domain) and has_agent(domain):
        _thaw(domain)


def _is_paused(domain: libvirt.virDomain) -> bool:
    return bool(domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED)


def _frozen(domain: libvirt.virDomain, *, quiesce: bool | None) -> bool:
    """Freeze the file systems if wanted: whether they are frozen."""
    if quiesce is False or (quiesce is None and not has_agent(domain)):
        return False
    try:
        domain.fsFreeze()
    except libvirt.libvirtError as exc:
        if quiesce:
            raise
        _log.warning("the guest agent of domain %s does not freeze file systems: %s", domain.name(), exc)
        return False
    return True


def _thaw(domain: libvirt.virDomain) -> None:
    try:
        domain.fsThaw()
    except libvirt.libvirtError as exc:
        if domains.is_active(domain):
            _log.warning("the file systems of domain %s may stay frozen: %s", domain.name(), exc)


def _resume(domain: libvirt.virDomain) -> None:
    """Resume a domain that was paused on request, and not e.g. by a failed write."""
    with domains.gone_is_fine(or_ended=True):
        if domain.state() == [libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_USER]:
            domain.resume()

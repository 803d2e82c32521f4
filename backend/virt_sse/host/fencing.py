"""``virt-sse host fence``: takes the leases of a dead host away, so that other hosts may use its disks."""

from __future__ import annotations

import os
from uuid import uuid4

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditRecord, Component, Result, process_actor
from virt_sse.errors import InvalidValueError
from virt_sse.keys.host import Host
from virt_sse.model.hosts import HostRecord

_FENCE = "fence"


def refuse_fencing(host: Host, other: HostRecord) -> None:
    """Check that a host may be fenced.

    :raise InvalidValueError: When *other* is this host.
    :raise DiskInUseError: When the other host is alive.
    """
    from virt_sse.store.hosts import refuse_alive

    if other.id == host.leases.identity.id:
        raise InvalidValueError("a host cannot fence itself")
    refuse_alive(other)


def fence(host: Host, other: HostRecord) -> int:
    """Take all leases from a host whose machine is off, as the operator states; recorded in the audit log.

    :return: number of leases.
    :raise InvalidValueError: When *other* is this host.
    :raise DiskInUseError: When the other host is alive.
    :raise AuditError: When the statement cannot be recorded.
    """
    refuse_fencing(host, other)
    host.leases.renew()
    record = AuditRecord(
        component=Component.HOST,
        actor=process_actor(),
        action=_FENCE,
        key="-",
        source=os.uname().nodename,
        result=Result.REQUESTED,
        reason=f"host {other.name} ({other.id}) is off, as the operator states",
        correlation=uuid4(),
    )
    AuditLog.of_host(host.config).append(record)
    return host.store.hosts.fence(other)

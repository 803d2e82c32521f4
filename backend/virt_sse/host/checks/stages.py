"""The processes below QEMU: their user ids, and records that no running domain needs."""

from __future__ import annotations

import pwd
from collections.abc import Iterator, Sequence

from virt_sse.errors import LibvirtUnavailableError, StageError
from virt_sse.host.fault import HostFault, Severity
from virt_sse.keys.host import Host
from virt_sse.libvirt import domains
from virt_sse.libvirt.connection import connected
from virt_sse.model.disks import Disk
from virt_sse.stages.storage_user import is_mapped


def user_ids(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Storage processes of different disks are kept apart by their user ids."""
    config = host.config
    if config.storage_user is not None:
        return
    uids = config.storage_uids
    text, remedy = f"uids {uids[0]}-{uids[-1]}", "set 'storage-uids' in [host] to free ids"
    if not is_mapped(uids):
        problem = f"the user namespace has no {text}: double encryption does not start"
        yield HostFault("uids-not-mapped", "uids", problem, remedy, Severity.WARNING)
    taken = [entry.pw_name for entry in pwd.getpwall() if entry.pw_uid in uids]
    if taken:
        problem = f"{text} of storage processes belong to accounts: {', '.join(taken[:5])}"
        yield HostFault("uids-taken", "uids", problem, remedy)


def leftovers(host: Host, _disks: Sequence[Disk]) -> Iterator[HostFault]:
    """Records of stages without a running domain, and dead processes of running domains."""
    damaged: list[StageError] = []
    records = host.stages.records(damaged.append)
    for error in damaged:
        yield HostFault(
            "stage-record-damaged", "stages", str(error), "restart the machine, or report a fault"
        )
    if not records:
        return
    try:
        with connected(host.config.libvirt_uri) as connection:
            running = {each.domain_id: domains.runs(connection, each.domain_id) for each in records}
    except LibvirtUnavailableError as exc:
        yield HostFault(
            "libvirt-unreachable", "libvirt", str(exc), exc.hint or "start libvirtd (or virtqemud)"
        )
        return
    for record in records:
        part = f"domain {record.domain}"
        if not running[record.domain_id]:
            problem = f"storage processes or records of disk {record.disk_id} outlived the domain"
            remedy = "start the agent, which ends them; or start and stop the domain"
            yield HostFault("stage-leftover", part, problem, remedy, Severity.WARNING)
        elif dead := host.stages.dead(record):
            problem = f"the {' and the '.join(dead)} of disk {record.disk_id} died"
            yield HostFault(
                "stage-dead", part, problem, f"virsh destroy {record.domain}, then start it again"
            )

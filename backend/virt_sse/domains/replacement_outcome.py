"""The outcome of a copy whose domain has ended: which of source and new disk holds the data.

A copy pauses the domain before its QEMU pivots to the new disk, and records the pivot before the domain goes
on. Without the record, both have the same content if the domain has the new disk, and the source is whole in
any case.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.replacements import Replacement, ReplacementState
from virt_sse.system.locks import DiskLocks

if TYPE_CHECKING:
    from virt_sse.store.store import Store


def has_new_disk(definition: DomainDefinition, copy: Replacement) -> bool:
    """Whether a definition has the new disk of *copy* itself, not only as the target of a block copy."""
    return any(chain.links[0].disk_id == copy.disk_id for chain in definition.disk_chains())


def settle_ended(store: Store, locks: DiskLocks, definition: DomainDefinition) -> None:
    """Settle the copies of the disks of an ended domain by the definition of its next start; without libvirt.

    :raise DiskInUseError: When another process is at work on a copy.
    """
    for disk_id in {use.disk_id for use in definition.our_disks}:
        copy = store.replacements.find(disk_id)
        if copy is None or copy.state is ReplacementState.DONE:
            continue
        with locks.hold(copy.lock_id):
            if has_new_disk(definition, copy):
                store.replacements.take_over(copy)
            else:
                store.replacements.abandon(copy)

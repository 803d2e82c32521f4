"""The end of a domain: removes the domain's stages, temporary disk and secrets, and counts its disks' use.

Needs no key, and the store only to give the leases of a shared store back. The libvirt hook therefore loads
neither keys nor a store in SQLite when the agent does not run.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING
from uuid import UUID

from virt_sse.config import Config
from virt_sse.domains import temp_disks
from virt_sse.domains.incoming import IncomingDomains
from virt_sse.errors import StoreError
from virt_sse.keys.freshness import ImageFreshness
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import drop_secrets
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.model.vms import temp_disk_id
from virt_sse.stages import Stages
from virt_sse.system.database_url import is_postgresql

if TYPE_CHECKING:
    from virt_sse.keys.leases import Leases


def release(config: Config, definition: DomainDefinition) -> None:
    """Remove everything provided to a domain at the start.

    Our own records, of stages and temporary disks, are followed first: they include disks unplugged from the
    running domain, and do not depend on a definition that others write.

    :param definition: of the ended domain, by :meth:`DomainDefinition.salvage`: malformed parts stop nothing.
    :raise VirtSseError: When a part cannot be removed; the other parts are removed.
    """
    domain_id, stages = definition.uuid, Stages(config)
    records = [record for record in stages.records() if record.domain_id == domain_id]
    given = {SecretName(record.disk_id, record.guest_slot) for record in records if record.guest_slot}
    images = {(record.disk_id, record.image) for record in records}
    staged = {record.disk_id for record in records}
    images |= {
        (use.disk_id, use.source)
        for use in definition.our_disks
        if use.source and use.slot and use.disk_id not in staged  # else the source is a socket
    }
    if temp_disks.exists(config, domain_id):
        given.add(SecretName(temp_disk_id(domain_id), TEMP_SLOT))
    migration = IncomingDomains(config).forget(domain_id)
    with contextlib.ExitStack() as all_parts:  # runs in the opposite order
        if is_postgresql(config.store_url):
            leases = _end_leases_after(config, domain_id, all_parts)
            disk_ids = {disk_id for disk_id, _ in images}
            if_unknown = disk_ids - migration.received if migration else set()
            elsewhere = _in_use_elsewhere(leases, disk_ids, if_unknown=if_unknown)
            images = {each for each in images if each[0] not in elsewhere}
        for disk_id, image in images:
            all_parts.callback(ImageFreshness(config).end_use, disk_id, image)
        all_parts.callback(_drop_secrets, config, definition, given)
        all_parts.callback(temp_disks.erase, config, domain_id)
        all_parts.callback(
            stages.stop_damaged, definition.name, {use.disk_id for use in definition.our_disks}
        )
        all_parts.callback(stages.stop_domain, domain_id)


def _end_leases_after(config: Config, domain_id: UUID, all_parts: contextlib.ExitStack) -> Leases:
    """Give the leases back last: nothing of the domain uses the disks any more."""
    from virt_sse.keys.leases import Leases
    from virt_sse.store import LazyStore

    store = all_parts.enter_context(contextlib.closing(LazyStore(config.store_url)))
    leases = Leases(config, store)
    all_parts.callback(leases.end, domain_id)
    return leases


def _in_use_elsewhere(leases: Leases, disk_ids: set[UUID], *, if_unknown: set[UUID]) -> set[UUID]:
    """The disks in use on another host, which counts the use: the start here was refused, or failed.

    :param if_unknown: the answer when the store does not answer.
    """
    try:
        return leases.held_elsewhere(disk_ids)
    except StoreError:
        return if_unknown


def _drop_secrets(config: Config, definition: DomainDefinition, given: set[SecretName]) -> None:
    drop_secrets(config.libvirt_uri, given | definition.secrets)

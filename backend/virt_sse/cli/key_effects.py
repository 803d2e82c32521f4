"""What would stop on this host if a key could not be used any more, for dry runs and questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from uuid import UUID

from virt_sse.cli import session
from virt_sse.cli.output import warn
from virt_sse.model.disks import Disk
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyId

_SURVEY_SECONDS = 10.0


def what_stops(is_lost: Callable[[KeyId], bool]) -> list[str]:
    """What this host's agent would do with each running domain, and which disks nobody could open.

    The disks of other hosts are not known here. A host without a store has no disks.

    :param is_lost: whether a key version would be unusable.
    :return: phrases like ``shut domain web down``.
    :raise StoreError: When the store cannot be read.
    """
    with session.existing_store() as store:
        found = store.all() if store else []
    disks = {disk.id: disk for disk in found if any(is_lost(entry.wrapped.key) for entry in disk.deks)}
    if not disks:
        return []
    names = ", ".join(sorted(disk.name for disk in disks.values()))
    return [*_domains(disks), f"leave these disks and copies without a usable key: {names}"]


def _domains(disks: Mapping[UUID, Disk]) -> Iterator[str]:
    from virt_sse.agent.revocation import RevokedDisk, spared_skus, strictest_enforcement
    from virt_sse.page.survey import DomainSurvey

    survey = DomainSurvey(session.config().libvirt_uri).current(_SURVEY_SECONDS)
    for fault in survey.faults:
        warn(f"not all domains that would stop are known: {fault.part}: {fault.problem}")
    with session.host() as host:
        sets: dict[UUID, EncryptionSet] = {each.id: each for each in host.store.encryption_sets.all()}
        spared = spared_skus(host.plugins)
    for domain in survey.domains:
        used = [disks[use.disk_id] for use in domain.disks if use.disk_id and use.disk_id in disks]
        if domain.state == "off" or not used:
            continue
        revoked = [RevokedDisk(disk, sets.get(disk.set_id) if disk.set_id else None, "") for disk in used]
        wanted = strictest_enforcement(revoked, spared)
        yield {
            RevocationAction.NONE: f"leave domain {domain.name} running",
            RevocationAction.PAUSE: f"pause domain {domain.name}",
            RevocationAction.SHUTDOWN: f"shut domain {domain.name} down, and destroy it "
            f"after {wanted.grace_seconds} s",
            RevocationAction.DESTROY: f"destroy domain {domain.name}",
        }[wanted.action]

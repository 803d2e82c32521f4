"""The end of a domain: removes the domain's stages, temporary disk and secrets.

Needs no store and no key. The libvirt hook therefore loads neither when the agent does not run.
"""

from __future__ import annotations

import contextlib

from virt_sse.config import Config
from virt_sse.domains import temp_disks
from virt_sse.errors import VirtSseError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.secrets import drop_secrets
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.model.vms import temp_disk_id
from virt_sse.stages import Stages


def release(config: Config, definition: DomainDefinition) -> None:
    """Remove everything provided to a domain at the start.

    :param definition: of the ended domain.
    :raise VirtSseError: When a part cannot be removed; the other parts are removed.
    """
    domain_id, stages = definition.uuid, Stages(config)
    given = {use.secret for use in definition.our_disks}
    for record in stages.records():  # includes disks unplugged from the running domain
        if record.domain_id == domain_id:
            given.add(SecretName(record.disk_id, record.guest_slot))
    with contextlib.ExitStack() as all_parts:
        all_parts.callback(_release_vm, config, definition)
        all_parts.callback(stages.stop_domain, domain_id)
        drop_secrets(config.libvirt_uri, given)


def _release_vm(config: Config, definition: DomainDefinition) -> None:
    secrets = definition.vm_secrets
    if not secrets:
        return
    failed: VirtSseError | None = None
    if SecretName(temp_disk_id(definition.uuid), TEMP_SLOT) in secrets:
        try:
            temp_disks.erase(config, definition.uuid)
        except VirtSseError as exc:
            failed = exc
    drop_secrets(config.libvirt_uri, secrets)
    if failed:
        raise failed

"""What a vault does by itself: rotations and purges that are due, recorded like those that are asked for."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

from virt_sse.vault.keys.records import KeyVersion
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.trail import AuditedRequest, Trail
from virt_sse.vault.vault import Vault

_log = logging.getLogger(__name__)

_ACTOR = "vault"


def upkeep(vault: Vault, trail: Trail) -> None:
    """Rotate and purge what is due, and clear up. What fails is logged, and tried again next time."""
    for name in vault.rotation.due():
        _attempt(vault, trail, "rotate", name, vault.rotation.rotate)
    for name in vault.keys.due_for_purge():
        _attempt(vault, trail, "purge", name, vault.keys.purge_due)
    vault.keys.sweep()


def _attempt(
    vault: Vault, trail: Trail, action: str, name: str, do: Callable[[str], KeyVersion | None]
) -> None:
    asked = AuditedRequest(
        action=action,
        actor=_ACTOR,
        key=f"{vault.settings.url}/keys/{name}",
        version=None,
        disk=None,
        source=_ACTOR,
        correlation=uuid.uuid4(),
    )
    try:
        trail.requested(asked)
        made = do(name)
        trail.allowed(asked, made.version if made else None)
    except Refusal as refusal:
        _log.warning("cannot %s key %s: %s", action, name, refusal.message)

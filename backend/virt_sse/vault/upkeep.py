"""A vault's background work: due rotations and purges, recorded like requests."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Callable

from virt_sse.vault.keys.records import KeyVersion
from virt_sse.vault.refusals import FailureRefusal, Refusal
from virt_sse.vault.trail import AuditedRequest, Trail
from virt_sse.vault.vault import Vault

_log = logging.getLogger(__name__)

_ACTOR = "vault"


def upkeep(vault: Vault, trail: Trail) -> None:
    """Rotate and purge due keys, and destroy leftover key material. Failures are logged and retried later.

    Of several instances, one rotates or purges a key; the others find the work done.
    """
    try:
        for name in vault.rotation.due():
            _attempt(vault, trail, "rotate", name, vault.rotation.rotate_due)
        for name in vault.keys.due_for_purge():
            _attempt(vault, trail, "purge", name, vault.keys.purge_due)
    except FailureRefusal as refusal:
        _log.warning("cannot list keys to rotate or purge: %s", refusal.detail)
    vault.keys.sweep()


def _attempt(
    vault: Vault, trail: Trail, action: str, name: str, do: Callable[[str], KeyVersion | None]
) -> None:
    request = AuditedRequest(
        action=action,
        actor=_ACTOR,
        key=f"{vault.settings.url}/keys/{name}",
        version=None,
        disk=None,
        source=_ACTOR,
        correlation=uuid.uuid4(),
    )
    try:
        trail.requested(request)
        made = do(name)
        trail.allowed(request, made.version if made else None)
    except Refusal as refusal:
        _log.warning("cannot %s key %s: %s", action, name, refusal.message)
        with contextlib.suppress(Refusal):  # the log has been written to just before
            trail.refused(request, refusal)

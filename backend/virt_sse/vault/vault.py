"""An opened vault: all parts of the service put together."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from virt_sse.audit.record import AuditRecord
from virt_sse.vault.freshness import Freshness
from virt_sse.vault.home.database import Database, failures_named
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.home.sealing import BACKUPS, KEYS, TOKENS, Sealer
from virt_sse.vault.home.settings import HsmSettings, VaultSettings
from virt_sse.vault.hsm.access import open_hsm
from virt_sse.vault.hsm.protection import HsmProtection
from virt_sse.vault.identity.principals import Principals
from virt_sse.vault.identity.tokens import TOKEN_SECONDS, TokenIssuer
from virt_sse.vault.keys.backups import Backups
from virt_sse.vault.keys.material import Protection, SoftwareProtection
from virt_sse.vault.keys.rotation import RotationPolicies
from virt_sse.vault.keys.service import KeyService
from virt_sse.vault.keys.store import KeyStore
from virt_sse.vault.root_key import read_root_key

_log = logging.getLogger(__name__)


class AuditSink(Protocol):
    """The audit log for key use: :class:`virt_sse.audit.log.AuditLog`."""

    def append(self, record: AuditRecord) -> object:
        """Write *record* durably.

        :raise VirtSseError: When the record cannot be written.
        """


@dataclass(frozen=True, slots=True)
class Vault:
    """The parts of an opened vault.

    :ivar audit: the audit log; requests that cannot be recorded are refused.
    :ivar hsm: the protection backend of RSA-HSM keys, if the vault has an HSM.
    :ivar freshness: to be checked before each request.
    """

    settings: VaultSettings
    keys: KeyService
    rotation: RotationPolicies
    backups: Backups
    principals: Principals
    tokens: TokenIssuer
    audit: AuditSink
    hsm: HsmProtection | None
    freshness: Freshness


@contextlib.contextmanager
def open_vault(
    directory: VaultDirectory,
    audit: AuditSink,
    *,
    token_seconds: int = TOKEN_SECONDS,
    shortest_rotation: int | None = None,
    clock: Callable[[], float] = time.time,
) -> Iterator[Vault]:
    """Open the vault in *directory*; several instances, each with a folder, open a vault in PostgreSQL.

    :param token_seconds: lifetime of access tokens.
    :param shortest_rotation: the shortest interval in a rotation policy, in seconds; default Azure's 7 days.
    :param clock: seconds since 1970.
    :raise VaultError: When there is no vault, the vault is damaged, its database cannot be opened, or another
        process holds the folder's lock.
    """
    settings = directory.settings()
    with contextlib.ExitStack() as stack:
        stack.enter_context(directory.lock())
        database = stack.enter_context(contextlib.closing(Database(directory.database_url(settings))))
        with failures_named():
            root = read_root_key(directory, settings)
            store = KeyStore(database)
            sealer = root.sealer(KEYS)
            protections: list[Protection] = [SoftwareProtection(sealer)]
            hsm = _hsm(directory, settings.hsm, sealer)
            if hsm is not None:
                stack.callback(hsm.close)
                protections.append(hsm)
            principals = Principals(database, clock=clock)
            keys = KeyService(store, settings, protections, purged=principals.reload, clock=clock)
            keys.sweep(alone=not database.shared)
            failure = hsm.failure() if hsm is not None else None
            if failure is not None:
                _log.warning("%s", failure)
            opened = Vault(
                settings=settings,
                keys=keys,
                rotation=RotationPolicies(store, keys, shortest=shortest_rotation, clock=clock),
                backups=Backups(store, keys, root.sealer(BACKUPS)),
                principals=principals,
                tokens=TokenIssuer(
                    settings, database, principals, root.sealer(TOKENS), seconds=token_seconds, clock=clock
                ),
                audit=audit,
                hsm=hsm,
                freshness=Freshness(database, (keys.forget_opened, principals.reload)),
            )
        yield opened


def _hsm(directory: VaultDirectory, settings: HsmSettings | None, sealer: Sealer) -> HsmProtection | None:
    if settings is None:
        return None
    return HsmProtection(lambda: open_hsm(directory, settings), settings.tag, sealer)

"""Access to KEKs: wraps and unwraps DEKs through key providers, audits each use, notifies observers."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import AuditRecord, Component, Result, process_actor
from virt_sse.errors import AuditError, KeyDeniedError, VirtSseError
from virt_sse.model.disks import Disk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.events import KeyAction, KeyEvent, correlated, current_domain
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyRef, KeyState, WrappedDek
from virt_sse.plugins import PluginHost

_log = logging.getLogger(__name__)

TRUST, DELETE, RECOVER, PURGE = "trust", "delete", "recover", "purge"
"""The actions of records about decisions on disks: an image taken as it is, and the end of a disk."""

T = TypeVar("T", Dek, WrappedDek, KeyId)


class KeyAccess:
    """The only access to KEKs for all of virt-sse.

    The result of a use is returned only after its audit record is durable. A refused use raises its own error
    even if the refusal cannot be recorded.

    :param component: the component named in audit records.
    """

    def __init__(
        self, plugins: PluginHost, audit: AuditLog, *, component: Component = Component.HOST
    ) -> None:
        self._plugins = plugins
        self._audit = audit
        self._component = component

    def current_key(self, key: KeyRef, *, set_id: UUID | None = None) -> KeyId:
        """The current version of *key*, which wraps new DEKs.

        :param set_id: id of the disk encryption set to act for, with the set's identity.
        :raise KeyProviderError: When the provider has no such key or does not answer.
        """
        return self._plugins.key_provider(key.provider, set_id).current_key(key.name)

    def key_state(self, key: KeyId, *, set_id: UUID | None = None) -> KeyState:
        """The state of *key* for a set; ``UNREACHABLE`` if its provider does not load or answer."""
        try:
            return self._plugins.key_provider(key.provider, set_id).key_state(key)
        except KeyDeniedError:
            return KeyState.DENIED
        except VirtSseError:
            return KeyState.UNREACHABLE

    def wrapping_key(self, key: KeyRef, encryption_set: EncryptionSet | None) -> KeyId:
        """The version of *key* for DEKs in *encryption_set*: the set's fixed version, else the current.

        :raise KeyProviderError: When the provider has no such key or does not answer.
        """
        if encryption_set is None:
            return self.current_key(key)
        if encryption_set.key == key and encryption_set.key_version:
            return KeyId(key.provider, key.name, encryption_set.key_version)
        return self.current_key(key, set_id=encryption_set.id)

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext, set_id: UUID | None = None) -> WrappedDek:
        """Wrap *dek* with *key*.

        :param set_id: id of the disk encryption set to act for, with the set's identity.
        :raise KeyProviderError: By meaning; see :meth:`KeyProvider.wrap`.
        :raise AuditError: When the use cannot be recorded.
        """
        return self._use(
            KeyAction.WRAP,
            key,
            context,
            lambda: self._plugins.key_provider(key.provider, set_id).wrap(dek, key, context=context),
        )

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext, set_id: UUID | None = None) -> Dek:
        """Unwrap a DEK.

        :param set_id: id of the disk encryption set to act for, with the set's identity.
        :raise KeyProviderError: By meaning; see :meth:`KeyProvider.unwrap`.
        :raise AuditError: When the use cannot be recorded.
        """
        key = wrapped.key
        return self._use(
            KeyAction.UNWRAP,
            key,
            context,
            lambda: self._plugins.key_provider(key.provider, set_id).unwrap(wrapped, context=context),
        )

    def key_states(self, disk: Disk) -> dict[KeyId, KeyState]:
        """The state of each KEK that wraps a DEK of *disk*."""
        return {
            entry.wrapped.key: self.key_state(entry.wrapped.key, set_id=disk.identity_for(entry.slot))
            for entry in disk.deks
        }

    def unwrap_all(self, disk: Disk) -> list[Dek]:
        """Unwrap all DEKs of *disk*; in the order of its slots, the guest's first.

        :raise KeyProviderError: By meaning; see :meth:`KeyProvider.unwrap`.
        :raise AuditError: When the use cannot be recorded.
        """
        return [self.unwrap_slot(disk, entry.slot) for entry in disk.deks]

    def unwrap_slot(self, disk: Disk, slot: str) -> Dek:
        """Unwrap the DEK in *slot* of *disk*, with the identity that may use the slot's KEK.

        :raise: As :meth:`unwrap_all`.
        """
        return self.unwrap(disk.dek(slot).wrapped, context=disk.context(slot), set_id=disk.identity_for(slot))

    def rotate(self, key: KeyRef) -> KeyId:
        """Create a new version of *key* and make it current.

        :raise KeyProviderError: When the provider refuses, or its keys are rotated elsewhere.
        :raise AuditError: When the use cannot be recorded; nothing has been done then.
        """
        return self._use(
            KeyAction.ROTATE, key, None, lambda: self._plugins.key_provider(key.provider).rotate(key.name)
        )

    def note(self, action: str, disk: Disk, reason: str) -> None:
        """Record a decision on a disk that uses no key.

        :param action: e.g. :data:`TRUST`.
        :param reason: details, e.g. what about a trusted image could not be checked.
        :raise AuditError: When the decision cannot be recorded; it is refused then.
        """
        with correlated() as correlation:
            self._audit.append(
                AuditRecord(
                    component=self._component,
                    actor=process_actor(),
                    action=action,
                    key=f"{disk.key.provider}:{disk.key.name}",
                    disk=disk.id,
                    source=os.uname().nodename,
                    result=Result.ALLOWED,
                    reason=reason,
                    correlation=correlation,
                )
            )

    def _use(
        self, action: KeyAction, key: KeyId | KeyRef, context: DekContext | None, use: Callable[[], T]
    ) -> T:
        with correlated() as correlation:
            record = AuditRecord(
                component=self._component,
                actor=process_actor(),
                action=action.value,
                key=f"{key.provider}:{key.name}",
                key_version=key.version if isinstance(key, KeyId) else None,
                disk=context.disk_id if context else None,
                slot=context.slot if context else None,
                domain=current_domain(),
                source=os.uname().nodename,
                result=Result.REQUESTED,
                correlation=correlation,
            )
            if action is KeyAction.ROTATE:
                self._audit.append(record)
            began = time.monotonic()
            try:
                result = use()
            except BaseException as exc:
                seconds = time.monotonic() - began
                # Messages of foreign exceptions may contain key material.
                message = f": {exc}" if isinstance(exc, VirtSseError) else ""
                self._record_refusal(
                    replace(record, result=Result.REFUSED, reason=type(exc).__name__ + message)
                )
                error = f"{type(exc).__name__}: {exc}"
                self._plugins.key_event(KeyEvent(action, key, context, error, correlation, seconds))
                raise
            seconds = time.monotonic() - began
        version = result.version if isinstance(result, KeyId) else record.key_version
        self._audit.append(
            replace(record, time=datetime.now(UTC), result=Result.ALLOWED, key_version=version)
        )
        self._plugins.key_event(KeyEvent(action, key, context, correlation=correlation, seconds=seconds))
        return result

    def _record_refusal(self, record: AuditRecord) -> None:
        try:
            self._audit.append(record)
        except AuditError as exc:
            _log.error(
                "a refusal to %s with key %s is not in the audit log: %s", record.action, record.key, exc
            )

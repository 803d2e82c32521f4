"""Wrapping and unwrapping through the key providers, with every use audited and told to the observers."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from virt_sse.audit import AuditLog
from virt_sse.audit_record import AuditRecord, Component, Result, process_actor
from virt_sse.errors import AuditError, VirtSseError
from virt_sse.events import KeyAction, KeyEvent, correlated, current_domain
from virt_sse.keys import Dek, DekContext, KeyId, KeyRef, WrappedDek
from virt_sse.plugins import PluginHost

_log = logging.getLogger(__name__)

T = TypeVar("T", Dek, WrappedDek, KeyId)


class Wrapping:
    """The one way to a KEK for all of virt-sse.

    What comes of a use is handed out only when its record is durable in the audit log. One that was refused
    stays refused for that reason, also when it cannot be recorded.

    :param component: in whose name uses are recorded.
    """

    def __init__(
        self, plugins: PluginHost, audit: AuditLog, *, component: Component = Component.HOST
    ) -> None:
        self._plugins = plugins
        self._audit = audit
        self._component = component

    def current_key(self, key: KeyRef) -> KeyId:
        """The version of *key* that a new DEK would be wrapped with.

        :raise KeyProviderError: When the provider has no such key or does not answer.
        """
        return self._plugins.key_provider(key.provider).current_key(key.name)

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        """Wrap *dek* with *key*.

        :raise KeyProviderError: By meaning; see :meth:`KeyProvider.wrap`.
        :raise AuditError: When it cannot be recorded.
        """
        return self._use(
            KeyAction.WRAP,
            key,
            context,
            lambda: self._plugins.key_provider(key.provider).wrap(dek, key, context=context),
        )

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        """The DEK in *wrapped*.

        :raise KeyProviderError: By meaning; see :meth:`KeyProvider.unwrap`.
        :raise AuditError: When it cannot be recorded.
        """
        key = wrapped.key
        return self._use(
            KeyAction.UNWRAP,
            key,
            context,
            lambda: self._plugins.key_provider(key.provider).unwrap(wrapped, context=context),
        )

    def rotate(self, key: KeyRef) -> KeyId:
        """Make a new version of *key*, and make it current.

        :raise KeyProviderError: When the provider refuses, or its keys are rotated elsewhere.
        :raise AuditError: When it cannot be recorded; before anything is done.
        """
        return self._use(
            KeyAction.ROTATE, key, None, lambda: self._plugins.key_provider(key.provider).rotate(key.name)
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
            try:
                result = use()
            except BaseException as exc:
                # A message that is not ours is not known to be free of key material.
                message = f": {exc}" if isinstance(exc, VirtSseError) else ""
                self._record_refusal(
                    replace(record, result=Result.REFUSED, reason=type(exc).__name__ + message)
                )
                error = f"{type(exc).__name__}: {exc}"
                self._plugins.key_event(KeyEvent(action, key, context, error, correlation))
                raise
        version = result.version if isinstance(result, KeyId) else record.key_version
        self._audit.append(
            replace(record, time=datetime.now(UTC), result=Result.ALLOWED, key_version=version)
        )
        self._plugins.key_event(KeyEvent(action, key, context, correlation=correlation))
        return result

    def _record_refusal(self, record: AuditRecord) -> None:
        try:
            self._audit.append(record)
        except AuditError as exc:
            _log.error(
                "a refusal to %s with key %s is not in the audit log: %s", record.action, record.key, exc
            )

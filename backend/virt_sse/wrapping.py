"""Wrapping and unwrapping through the key providers, with every use told to the observers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from virt_sse.events import KeyAction, KeyEvent
from virt_sse.keys import Dek, DekContext, KeyId, KeyRef, WrappedDek
from virt_sse.plugins import PluginHost


class Wrapping:
    """The one way to a KEK for all of virt-sse."""

    def __init__(self, plugins: PluginHost) -> None:
        self._plugins = plugins

    def current_key(self, key: KeyRef) -> KeyId:
        """The version of *key* that a new DEK would be wrapped with.

        :raise KeyProviderError: When the provider has no such key or does not answer.
        """
        return self._plugins.key_provider(key.provider).current_key(key.name)

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        """Wrap *dek* with *key*.

        :raise KeyProviderError: By meaning; see :meth:`KeyProvider.wrap`.
        """
        with self._told(KeyAction.WRAP, key, context):
            return self._plugins.key_provider(key.provider).wrap(dek, key, context=context)

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        """The DEK in *wrapped*.

        :raise KeyProviderError: By meaning; see :meth:`KeyProvider.unwrap`.
        """
        with self._told(KeyAction.UNWRAP, wrapped.key, context):
            return self._plugins.key_provider(wrapped.key.provider).unwrap(wrapped, context=context)

    def rotate(self, key: KeyRef) -> KeyId:
        """Make a new version of *key*, and make it current.

        :raise KeyProviderError: When the provider refuses, or its keys are rotated elsewhere.
        """
        with self._told(KeyAction.ROTATE, key):
            return self._plugins.key_provider(key.provider).rotate(key.name)

    @contextlib.contextmanager
    def _told(
        self, action: KeyAction, key: KeyId | KeyRef, context: DekContext | None = None
    ) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            self._plugins.key_event(KeyEvent(action, key, context, error=f"{type(exc).__name__}: {exc}"))
            raise
        self._plugins.key_event(KeyEvent(action, key, context))

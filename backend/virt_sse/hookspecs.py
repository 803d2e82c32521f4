"""Hooks of virt-sse. A plugin implements any hooks with :data:`hookimpl`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    import typer

    from virt_sse.model.cloud import CloudProfile
    from virt_sse.model.events import KeyEvent
    from virt_sse.model.keys import KeyProvider
    from virt_sse.model.layers import EncryptionLayer, HostLayer
    from virt_sse.model.operations import Operation, Site

PROJECT = "virt_sse"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RegisterKeyProvider(Protocol):
    """Adds a key provider under *name*; *load* imports and returns its class at its first use."""

    def __call__(self, name: str, load: Callable[[], type[KeyProvider]]) -> None: ...


class RegisterEncryptionLayer(Protocol):
    """Adds an encryption layer under *name*; *load* imports and returns its class at its first use."""

    def __call__(self, name: str, load: Callable[[], type[EncryptionLayer | HostLayer]]) -> None: ...


@hookspec
def virt_sse_register_key_providers(register: RegisterKeyProvider) -> None:
    """Call ``register(name, load)`` for each key provider of the plugin.

    Names are kebab-case and unique among all plugins. Heavy imports belong into *load*, not here: then a
    broken provider does no harm while unused.
    """


@hookspec
def virt_sse_register_encryption_layers(register: RegisterEncryptionLayer) -> None:
    """Call ``register(name, load)`` for each encryption layer of the plugin.

    A layer serves disks at rest, or VMs with encryption at host.
    """


@hookspec
def virt_sse_add_commands(app: typer.Typer) -> None:
    """Add commands to the command line; *app* is the root of ``virt-sse``.

    Called for every command: return quickly.
    """


@hookspec
def virt_sse_validate(operation: Operation, site: Site) -> None:
    """Raise :class:`~virt_sse.errors.PolicyError` to refuse *operation* at *site* before its first step.

    Any other exception refuses the operation, too, and so does any return value except ``None``: a failing
    policy does not grant permission.
    """


@hookspec
def virt_sse_cloud_profile(site: Site) -> CloudProfile | None:
    """Return the limits and exceptions of the cloud that *site* follows; ``None`` to leave them to others.

    The answer of one plugin counts: the built-in answer is used only if all other plugins return ``None``.
    Raise :class:`~virt_sse.errors.PolicyError` if the values cannot be read.
    """


@hookspec
def virt_sse_key_event(event: KeyEvent) -> None:
    """Observe a use of a key, after the fact. An exception is logged and has no other effect."""

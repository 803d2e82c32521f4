"""Configuration, plugins and backend of a command. The backend is opened at its first use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

from virt_sse.config import Config
from virt_sse.plugins import PluginHost

if TYPE_CHECKING:
    from virt_sse.backend import Backend

_host: ContextVar[tuple[Config, PluginHost]] = ContextVar("host")


@contextlib.contextmanager
def use(config: Config, plugins: PluginHost) -> Iterator[None]:
    """Run commands on the host described by *config*."""
    token = _host.set((config, plugins))
    try:
        yield
    finally:
        _host.reset(token)


def config() -> Config:
    """The configuration of the host of this command."""
    return _host.get()[0]


def plugins() -> PluginHost:
    """The plugins of this command."""
    return _host.get()[1]


@contextlib.contextmanager
def backend() -> Iterator[Backend]:
    """The backend of this command, closed at the end.

    Imported here: the import takes longer than ``--help`` may take.
    """
    from virt_sse.backend import Backend

    with Backend(*_host.get()) as opened:
        yield opened

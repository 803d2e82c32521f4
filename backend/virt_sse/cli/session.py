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
    from virt_sse.keys.host import Host
    from virt_sse.model.disk_kind import DiskKind
    from virt_sse.model.disks import Disk
    from virt_sse.store import StoreReads

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


def listed_disks(kind: DiskKind | None = None) -> list[Disk]:
    """All disks, by name, as stored; from the backend if it may have a killed command's work to finish.

    :param kind: list the copies of this kind instead.
    :raise StoreError: When the store cannot be opened.
    """
    from virt_sse.model.disk_kind import DiskKind

    return all_disks(kind or DiskKind.DISK)


def all_disks(kind: DiskKind | None = None) -> list[Disk]:
    """All disks and copies, of every kind or of one, as :func:`listed_disks`.

    :raise StoreError: When the store cannot be opened.
    """
    from virt_sse.keys.unfinished_work import has_unfinished_work
    from virt_sse.store import LazyStore

    with contextlib.closing(LazyStore(config().store_url)) as store:
        if not has_unfinished_work(config(), store.reads()):
            return store.reads().all(kind)
    with backend() as b:
        return b.host.store.all(kind)


@contextlib.contextmanager
def existing_store() -> Iterator[StoreReads | None]:
    """The store for queries. A missing or outdated database in SQLite is neither created nor migrated."""
    from virt_sse.store import LazyStore
    from virt_sse.store.reader import StoreReader

    url = config().store_url
    if url.startswith("sqlite"):
        yield StoreReader.of(url)
        return
    with contextlib.closing(LazyStore(url)) as store:
        yield store.reads()


@contextlib.contextmanager
def host() -> Iterator[Host]:
    """The host of this command, without the services of the backend, for commands that look at a disk.

    Where killed commands left work, the backend finishes the work first.

    :raise StoreError: When the store cannot be opened.
    """
    from virt_sse.audit.record import Component
    from virt_sse.keys.host import Host

    with contextlib.closing(Host.open(config(), plugins(), component=Component.HOST)) as opened:
        if opened.has_unfinished_work():
            with backend():
                pass
        yield opened


@contextlib.contextmanager
def backend() -> Iterator[Backend]:
    """The backend of this command, closed at the end.

    Imported here: the import takes longer than ``--help`` may take.
    """
    from virt_sse.backend import Backend

    with Backend(*_host.get()) as opened:
        yield opened

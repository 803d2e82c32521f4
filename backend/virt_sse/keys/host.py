"""Host: the parts shared by all services of a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from virt_sse.audit.log import AuditLog
from virt_sse.audit.record import Component
from virt_sse.config import Config
from virt_sse.keys.access import KeyAccess
from virt_sse.keys.freshness import ImageFreshness
from virt_sse.keys.leases import Leases, locks_of
from virt_sse.keys.unfinished_work import has_unfinished_work
from virt_sse.plugins import PluginHost
from virt_sse.qemu import ceph
from virt_sse.stages import Stages
from virt_sse.store import LazyStore, StoreReads
from virt_sse.store.image_paths import ImagePaths
from virt_sse.system.locks import DiskLocks

if TYPE_CHECKING:
    from virt_sse.store.store import Store


@dataclass(frozen=True, slots=True)
class Host:
    """Configuration, store, plugins, keys, locks, leases, stages, freshness and paths of images of a host.

    Every service takes a ``Host`` as its first parameter.
    """

    config: Config
    opened_store: LazyStore
    plugins: PluginHost
    keys: KeyAccess
    locks: DiskLocks
    leases: Leases
    stages: Stages
    freshness: ImageFreshness
    image_paths: ImagePaths

    @property
    def store(self) -> Store:
        """The store, opened at its first use.

        :raise StoreError: When the store cannot be opened.
        """
        return self.opened_store.full()

    @property
    def store_reads(self) -> StoreReads:
        """The store for queries alone, without SQLAlchemy where possible."""
        return self.opened_store.reads()

    def has_unfinished_work(self) -> bool:
        """Whether the backend may find work of killed commands to finish or undo.

        :raise StoreError: When the store cannot be opened.
        """
        return has_unfinished_work(self.config, self.store_reads)

    @classmethod
    def open(cls, config: Config, plugins: PluginHost | None = None, *, component: Component) -> Self:
        """Load the plugins of the host described by *config*.

        :param plugins: default: the installed ones. :meth:`close` closes them in either case.
        :param component: the component named in the audit records of key uses.
        :raise PluginError: When a required plugin is broken.
        """
        ceph.use(config.ceph)
        plugins = plugins or PluginHost(config)
        image_paths = ImagePaths(config.image_paths)
        opened_store = LazyStore(config.store_url, image_paths)
        leases = Leases(config, opened_store)
        return cls(
            config=config,
            opened_store=opened_store,
            plugins=plugins,
            keys=KeyAccess(plugins, AuditLog.of_host(config), component=component),
            locks=locks_of(config, leases),
            leases=leases,
            stages=Stages(config),
            freshness=ImageFreshness(config),
            image_paths=image_paths,
        )

    def close(self) -> None:
        """Close the store and the key providers."""
        self.opened_store.close()
        self.plugins.close()

"""qemu-storage-daemon(1): opens LUKS volumes outside of guests, and exports their content by NBD.

The daemon gets the image's path and the DEKs by QMP, never on its command line. The QMP client and asyncio
are imported at their first use: most starts of domains need no daemon, and wait for the import.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from virt_sse.errors import MonitorError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import ceph
from virt_sse.qemu.image_file import file_node
from virt_sse.system.rbd_names import is_rbd

if TYPE_CHECKING:
    from virt_sse.qemu.qmp import Monitor
    from virt_sse.qemu.unlocking import BaseImage

T = TypeVar("T")
Answer = Any
"""Result of a QMP command."""

FILE_NODE, VOLUME_NODE, EXPORTED_NODE, EXPORT = "file", "volume", "exported", "disk"
"""Node names of the image, of the innermost volume and of the exported node, and the id of the export.

The exported node has the innermost volume as its child. Another child can take its place under a running
guest, whose QEMU stays connected (``blockdev-reopen``).
"""
BASE_FILE_NODE, BASE_NODE = "base-file", "base"
"""Node names of the image below a linked clone, and of its content."""
_DEKS, _BASE_DEKS = "dek", "base-dek"
"""Secret objects, each with the number of its volume, innermost first."""
_UNMAP = {"discard": "unmap"}
_UNEXPORT_SECONDS = 5.0


def arguments(monitor: int, listening: int) -> list[str]:
    """The command line of a daemon, to be configured by :meth:`StorageDaemon.open_volumes`.

    :param monitor: descriptor of a listening Unix socket for QMP.
    :param listening: descriptor of a listening Unix socket for NBD.
    """
    return [
        *("qemu-storage-daemon", "--chardev", f"socket,id=qmp,fd={monitor},server=on,wait=off"),
        *("--monitor", "chardev=qmp", "--nbd-server", f"addr.type=fd,addr.str={listening}"),
    ]


@dataclass(frozen=True, slots=True)
class NbdExport:
    """An NBD export of an image's bytes.

    :ivar socket: path of the server's Unix socket.
    """

    socket: Path
    name: str


@dataclass(frozen=True, slots=True)
class StorageDaemon:
    """A running storage daemon.

    :ivar monitor: path of the monitor's Unix socket.
    :raise MonitorError: From every method, when the daemon refuses a command or has ended.
    """

    monitor: Path

    def open_volumes(
        self,
        image: Path | NbdExport,
        image_format: DiskFormat,
        deks: Sequence[Dek],
        export: str,
        *,
        base: BaseImage | None = None,
    ) -> None:
        """Open nested LUKS volumes in *image*, and export the innermost.

        :param deks: at least one, innermost first.
        :param export: name of the export.
        :param base: the image below a linked clone; opened read-only.
        """

        async def do(monitor: Monitor) -> None:
            if base:
                await _open_base(monitor, base)
            await _lend(monitor, deks)
            in_ceph = isinstance(image, Path) and is_rbd(image)
            if in_ceph:
                await monitor.execute("object-add", ceph.secret_object())
            for node in image_nodes(image, image_format, len(deks), has_base=base is not None):
                await monitor.execute("blockdev-add", node)
            await _forget(monitor, len(deks))
            if in_ceph:
                await monitor.execute("object-del", {"id": ceph.SECRET})
            await monitor.execute("blockdev-add", {**EXPORTED, "file": VOLUME_NODE})
            await monitor.execute("block-export-add", export_of(export))

        self._do(do)

    def lend(self, deks: Sequence[Dek], base: BaseImage | None = None) -> list[str]:
        """Give the daemon DEKs for volumes that another process opens; the DEKs stay until deleted.

        :param deks: innermost first.
        :param base: the image below a linked clone, to be opened read-only.
        :return: the ids of the secret objects.
        """

        async def do(monitor: Monitor) -> list[str]:
            if base:
                await _open_base(monitor, base)
            for name in _secrets(len(deks)):
                with contextlib.suppress(MonitorError):  # of a call before
                    await monitor.execute("object-del", {"id": name})
            await _lend(monitor, deks)
            return _secrets(len(deks))

        return self._do(do)

    def sizes(self) -> list[int]:
        """Sizes of the volumes in bytes, innermost first."""

        async def do(monitor: Monitor) -> list[int]:
            return await _sizes(monitor)

        return self._do(do)

    def grow(self, sizes: Sequence[int], export: str) -> None:
        """Grow volumes, unless all are large enough. Growing disconnects the client.

        :param sizes: wanted sizes in bytes, innermost first; volumes above their size stay unchanged.
        :param export: name of the export.
        """
        import asyncio

        async def do(monitor: Monitor) -> None:
            present = await _sizes(monitor)
            if len(present) < len(sizes):
                raise MonitorError("the disk is being handed over to another host")
            wanted = zip(volume_nodes(len(sizes)), sizes, present, strict=True)
            small = [(node, size) for node, size, before in wanted if before < size]
            if not small:
                return
            await monitor.execute("block-export-del", {"id": EXPORT, "mode": "hard"})
            try:
                deadline = time.monotonic() + _UNEXPORT_SECONDS
                while await monitor.execute("query-block-exports"):
                    if time.monotonic() > deadline:
                        raise MonitorError("the storage daemon does not disconnect its client")
                    await asyncio.sleep(0.01)
                for node, size in reversed(small):
                    await monitor.execute("block_resize", {"node-name": node, "size": size})
            finally:
                if not await monitor.execute("query-block-exports"):
                    await monitor.execute("block-export-add", export_of(export))

        self._do(do)

    def block_graph(self) -> tuple[Answer, Answer, Answer]:
        """The daemon's block graph.

        :return: the results of ``query-named-block-nodes``, ``x-debug-query-block-graph`` and
            ``query-block-exports``.
        """

        async def do(monitor: Monitor) -> tuple[Answer, Answer, Answer]:
            return (
                await monitor.execute("query-named-block-nodes"),
                await monitor.execute("x-debug-query-block-graph"),
                await monitor.execute("query-block-exports"),
            )

        return self._do(do)

    def _do(self, do: Callable[[Monitor], Awaitable[T]]) -> T:
        import asyncio

        from virt_sse.qemu.qmp import connected

        async def connect_and_do() -> T:
            async with connected(self.monitor) as monitor:
                return await do(monitor)

        return asyncio.run(connect_and_do())


def volume_nodes(count: int, innermost: str = VOLUME_NODE) -> list[str]:
    """Node names of *count* nested volumes, innermost first."""
    return [innermost, *(f"{innermost}{number}" for number in range(1, count))]


def image_nodes(
    image: Path | NbdExport, image_format: DiskFormat, volumes: int, *, has_base: bool
) -> list[dict[str, object]]:
    """The nodes of an image and its nested volumes, outermost first, as for ``blockdev-add``.

    :param volumes: their number.
    :param has_base: whether the image is a linked clone.
    """
    nodes = _volumes(volume_nodes(volumes), FILE_NODE, image_format, _DEKS, _UNMAP)
    if has_base:
        nodes[-1] |= {"backing": BASE_NODE}
    return [_stored(image), *nodes]


EXPORTED: Mapping[str, object] = MappingProxyType({"driver": "raw", "node-name": EXPORTED_NODE, **_UNMAP})
"""The exported node, without its child."""


def export_of(name: str) -> dict[str, object]:
    """The export for the guest, as for ``block-export-add``."""
    return {"type": "nbd", "id": EXPORT, "node-name": EXPORTED_NODE, "name": name, "writable": True}


async def _open_base(monitor: Monitor, base: BaseImage) -> None:
    """Open the image below a linked clone, read-only."""
    read_only = {"read-only": True}
    await _lend(monitor, base.deks, _BASE_DEKS)
    file = _stored(base.path) | {"node-name": BASE_FILE_NODE}
    names = volume_nodes(len(base.deks), BASE_NODE)
    for node in (file, *_volumes(names, BASE_FILE_NODE, base.format, _BASE_DEKS, {})):
        await monitor.execute("blockdev-add", {**node, **read_only})
    await _forget(monitor, len(base.deks), _BASE_DEKS)


def _secrets(count: int, prefix: str = _DEKS) -> list[str]:
    return [f"{prefix}{number}" for number in range(count)]


async def _lend(monitor: Monitor, deks: Sequence[Dek], prefix: str = _DEKS) -> None:
    for name, dek in zip(_secrets(len(deks), prefix), deks, strict=True):
        secret = {"qom-type": "secret", "id": name, "data": dek.passphrase.decode()}
        await monitor.execute("object-add", secret)


async def _forget(monitor: Monitor, count: int, prefix: str = _DEKS) -> None:
    """Delete secrets: an open volume keeps its key."""
    for name in _secrets(count, prefix):
        await monitor.execute("object-del", {"id": name})


def _stored(image: Path | NbdExport) -> dict[str, object]:
    node: dict[str, object] = {"node-name": FILE_NODE, "discard": "unmap"}
    if isinstance(image, Path):
        return node | file_node(image)
    server = {"type": "unix", "path": str(image.socket)}
    return node | {"driver": "nbd", "server": server, "export": image.name}


def _volumes(
    names: Sequence[str], below: str, image_format: DiskFormat, deks: str, options: Mapping[str, object]
) -> list[dict[str, object]]:
    """Nested volumes, outermost first.

    :param names: of the nodes, innermost first.
    :param below: the node of the file.
    :param deks: prefix of their secrets.
    :param options: of all nodes.
    """
    nodes = []
    for name, secret in reversed(list(zip(names, _secrets(len(names), deks), strict=True))):
        node: dict[str, object] = {"driver": image_format.qemu_driver, "node-name": name, "file": below}
        if image_format is DiskFormat.QCOW2:
            node |= {"backing": None, "encrypt": {"format": "luks", "key-secret": secret}}
        else:
            node["key-secret"] = secret
        nodes.append({**node, **options})
        below = name
    return nodes


async def _sizes(monitor: Monitor) -> list[int]:
    nodes = await monitor.execute("query-named-block-nodes")
    found = {str(node["node-name"]): int(node["image"]["virtual-size"]) for node in nodes}
    return [found[name] for name in volume_nodes(len(found)) if name in found]

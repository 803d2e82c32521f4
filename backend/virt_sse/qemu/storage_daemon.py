"""qemu-storage-daemon(1): opens LUKS volumes outside of guests, and exports their content by NBD.

The daemon gets the image's path and the DEKs by QMP, never on its command line. The QMP client and asyncio
are imported at their first use: most starts of domains need no daemon, and wait for the import.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from virt_sse.errors import MonitorError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu.image_file import file_driver

if TYPE_CHECKING:
    from virt_sse.qemu.qmp import Monitor
    from virt_sse.qemu.unlocking import BaseImage

T = TypeVar("T")
Answer = Any
"""Result of a QMP command."""

FILE_NODE, VOLUME_NODE, EXPORT = "file", "volume", "disk"
"""Node names of the image and of the exported volume, and the id of the export."""
BASE_FILE_NODE, BASE_NODE = "base-file", "base"
"""Node names of the image below a linked clone, and of its content."""
_DEK = "dek"
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
                file = _stored(base.path) | {"node-name": BASE_FILE_NODE}
                await monitor.execute("blockdev-add", file | {"read-only": True})
                nodes = volume_nodes(len(base.deks), BASE_NODE)
                await _open(monitor, nodes, BASE_FILE_NODE, base.format, base.deks, {"read-only": True})
            await monitor.execute("blockdev-add", _stored(image))
            innermost = {"backing": BASE_NODE} if base else {}
            await _open(monitor, volume_nodes(len(deks)), FILE_NODE, image_format, deks, _UNMAP, innermost)
            await _export(monitor, export)

        self._do(do)

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
            wanted = zip(volume_nodes(len(sizes)), sizes, await _sizes(monitor), strict=True)
            small = [(node, size) for node, size, present in wanted if present < size]
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
                    await _export(monitor, export)

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


async def _open(
    monitor: Monitor,
    nodes: Sequence[str],
    below: str,
    image_format: DiskFormat,
    deks: Sequence[Dek],
    options: Mapping[str, object],
    innermost: Mapping[str, object] = MappingProxyType({}),
) -> None:
    """Open nested volumes.

    :param nodes: their names, innermost first.
    :param below: the node of the file.
    :param options: of all nodes.
    :param innermost: further options of the innermost node.
    """
    for node, dek in reversed(list(zip(nodes, deks, strict=True))):
        await monitor.execute(
            "object-add", {"qom-type": "secret", "id": _DEK, "data": dek.passphrase.decode()}
        )
        described = {**_volume(node, image_format, below), **options}
        await monitor.execute("blockdev-add", {**described, **(innermost if node == nodes[0] else {})})
        await monitor.execute("object-del", {"id": _DEK})  # the open volume keeps its key
        below = node


def _stored(image: Path | NbdExport) -> dict[str, object]:
    node: dict[str, object] = {"node-name": FILE_NODE, "discard": "unmap"}
    if isinstance(image, Path):
        return node | {"driver": file_driver(image), "filename": str(image)}
    server = {"type": "unix", "path": str(image.socket)}
    return node | {"driver": "nbd", "server": server, "export": image.name}


def _volume(name: str, image_format: DiskFormat, below: str) -> dict[str, object]:
    node: dict[str, object] = {"driver": image_format.qemu_driver, "node-name": name, "file": below}
    if image_format is DiskFormat.QCOW2:
        node |= {"backing": None, "encrypt": {"format": "luks", "key-secret": _DEK}}
    else:
        node["key-secret"] = _DEK
    return node


async def _export(monitor: Monitor, name: str) -> None:
    export = {"type": "nbd", "id": EXPORT, "node-name": VOLUME_NODE, "name": name, "writable": True}
    await monitor.execute("block-export-add", export)


async def _sizes(monitor: Monitor) -> list[int]:
    nodes = await monitor.execute("query-named-block-nodes")
    found = {str(node["node-name"]): int(node["image"]["virtual-size"]) for node in nodes}
    return [found[name] for name in volume_nodes(len(found)) if name in found]

"""qemu-storage-daemon(1): opens a LUKS volume outside of guests, and exports its content by NBD.

The daemon gets the image's path and the DEK by QMP, never on its command line. The QMP client and asyncio are
imported at their first use: most starts of domains need no daemon, and wait for the import.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import UUID

from virt_sse.errors import MonitorError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek

if TYPE_CHECKING:
    from virt_sse.qemu.qmp import Monitor

T = TypeVar("T")

FILE_NODE, VOLUME_NODE, EXPORT = "file", "volume", "disk"
_DEK = "dek"
_UNEXPORT_SECONDS = 5.0


def arguments(monitor: int, listening: int) -> list[str]:
    """The command line of a daemon, to be configured by :meth:`StorageDaemon.open_volume`.

    :param monitor: descriptor of a listening Unix socket for QMP.
    :param listening: descriptor of a listening Unix socket for NBD.
    """
    return [
        *("qemu-storage-daemon", "--chardev", f"socket,id=qmp,fd={monitor},server=on,wait=off"),
        *("--monitor", "chardev=qmp", "--nbd-server", f"addr.type=fd,addr.str={listening}"),
    ]


@dataclass(frozen=True, slots=True)
class StorageDaemon:
    """A running storage daemon.

    :ivar monitor: path of the monitor's Unix socket.
    :raise MonitorError: From every method, when the daemon refuses a command or has ended.
    """

    monitor: Path

    def open_volume(self, path: Path, image_format: DiskFormat, dek: Dek, disk_id: UUID) -> None:
        """Open the LUKS volume in the image at *path*, and export the volume under the disk's id."""

        async def do(monitor: Monitor) -> None:
            await monitor.execute(
                "object-add", {"qom-type": "secret", "id": _DEK, "data": dek.passphrase.decode()}
            )
            file = {"driver": "file", "node-name": FILE_NODE, "filename": str(path), "discard": "unmap"}
            await monitor.execute("blockdev-add", file)
            await monitor.execute("blockdev-add", _volume(image_format))
            await monitor.execute("object-del", {"id": _DEK})  # the open volume keeps its key
            await _export(monitor, disk_id)

        self._do(do)

    def size(self) -> int:
        """Size of the volume in bytes."""

        async def do(monitor: Monitor) -> int:
            return await _size(monitor)

        return self._do(do)

    def grow(self, size: int, disk_id: UUID) -> None:
        """Grow the volume to *size* bytes, unless large enough. Growing disconnects the client."""
        import asyncio

        async def do(monitor: Monitor) -> None:
            if await _size(monitor) >= size:
                return
            await monitor.execute("block-export-del", {"id": EXPORT, "mode": "hard"})
            try:
                deadline = time.monotonic() + _UNEXPORT_SECONDS
                while await monitor.execute("query-block-exports"):
                    if time.monotonic() > deadline:
                        raise MonitorError("the storage daemon does not disconnect its client")
                    await asyncio.sleep(0.01)
                await monitor.execute("block_resize", {"node-name": VOLUME_NODE, "size": size})
            finally:
                if not await monitor.execute("query-block-exports"):
                    await _export(monitor, disk_id)

        self._do(do)

    def nodes(self) -> list[dict[str, object]]:
        """The daemon's block nodes: the result of ``query-named-block-nodes``."""

        async def do(monitor: Monitor) -> list[dict[str, object]]:
            return list(await monitor.execute("query-named-block-nodes"))

        return self._do(do)

    def _do(self, do: Callable[[Monitor], Awaitable[T]]) -> T:
        import asyncio

        from virt_sse.qemu.qmp import connected

        async def connect_and_do() -> T:
            async with connected(self.monitor) as monitor:
                return await do(monitor)

        return asyncio.run(connect_and_do())


def _volume(image_format: DiskFormat) -> dict[str, object]:
    node: dict[str, object] = {
        "driver": image_format.qemu_driver,
        "node-name": VOLUME_NODE,
        "file": FILE_NODE,
        "discard": "unmap",
    }
    if image_format is DiskFormat.QCOW2:
        node |= {"backing": None, "encrypt": {"format": "luks", "key-secret": _DEK}}
    else:
        node["key-secret"] = _DEK
    return node


async def _export(monitor: Monitor, disk_id: UUID) -> None:
    export = {"type": "nbd", "id": EXPORT, "node-name": VOLUME_NODE, "name": str(disk_id), "writable": True}
    await monitor.execute("block-export-add", export)


async def _size(monitor: Monitor) -> int:
    nodes = await monitor.execute("query-named-block-nodes")
    return next(int(node["image"]["virtual-size"]) for node in nodes if node["node-name"] == VOLUME_NODE)

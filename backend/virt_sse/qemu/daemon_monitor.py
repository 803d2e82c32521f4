"""Commands to the monitor of a storage daemon, with the standard library alone.

For :mod:`~virt_sse.stages.hand_over`, a script without virt-sse's libraries. Other modules use
:mod:`~virt_sse.qemu.qmp`.
"""

from __future__ import annotations

import json
import socket
import time
from dataclasses import dataclass, field
from io import BufferedReader
from typing import Any

PAUSE_SECONDS = 0.01
"""Time between two polls of a daemon."""


class RefusedError(Exception):
    """The storage daemon refuses a command."""


@dataclass
class DaemonMonitor:
    """A connection to a storage daemon's monitor, for the commands of a block.

    :param path: of the monitor's socket.
    :raise OSError: From every method, when the daemon has ended.
    :raise RefusedError: Likewise, when the daemon refuses a command.
    """

    path: str
    _connection: socket.socket = field(init=False)
    _lines: BufferedReader = field(init=False)

    def __enter__(self) -> DaemonMonitor:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(self.path)
        self._lines = self._connection.makefile("rb")
        self._lines.readline()
        self("qmp_capabilities")
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._connection.close()

    def __call__(self, command: str, arguments: dict[str, object] | None = None) -> Any:
        """Execute a command, and return its result."""
        self._connection.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
        while line := self._lines.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RefusedError(f"{command}: {answer['error']['desc']}")
        raise ConnectionResetError(f"the storage daemon ended during {command}")

    def nodes(self) -> dict[str, Any]:
        """The block nodes, by name."""
        return {node["node-name"]: node for node in self("query-named-block-nodes")}

    def add(self, node: dict[str, object]) -> None:
        """Add a block node, unless the daemon has the node."""
        if node["node-name"] not in self.nodes():
            self("blockdev-add", node)

    def remove(self, *names: str) -> None:
        """Remove block nodes, from the top down, as far as the daemon has them."""
        there = self.nodes()
        for name in names:
            if name in there:
                self("blockdev-del", {"node-name": name})

    def export(self, export: dict[str, object]) -> None:
        """Add an export, unless the daemon has the export."""
        if export["id"] not in [each["id"] for each in self("query-block-exports")]:
            self("block-export-add", export)

    def unexport(self, name: str) -> None:
        """Remove an export, if there; return once the export is gone."""
        is_asked = False
        while name in [each["id"] for each in self("query-block-exports")]:
            if not is_asked:
                self("block-export-del", {"id": name, "mode": "hard"})
                is_asked = True
            time.sleep(PAUSE_SECONDS)

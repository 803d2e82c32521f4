"""The block graph of a running QEMU: which block node's data comes from which, and what is not encrypted.

Made of the answers to ``query-named-block-nodes``, ``x-debug-query-block-graph``, ``query-jobs`` and
``query-block-exports`` (QEMU ``qapi/block-core.json``). The second alone tells the edges; QEMU has had it
since 4.0, and calls it unstable.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virt_sse.errors import MonitorError
from virt_sse.verification.chains import LinkKind

Answer = Mapping[str, Any]

_CIPHERTEXT_EDGES = frozenset({"file", "data-file", "header"})
"""Edges from a node that encrypts to what it writes ciphertext to; its backing file it reads as it is."""
_DATALESS = frozenset({"null-co", "null-aio"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block node without children has its data.

    :ivar path: the file, or the NBD server's Unix socket.
    """

    name: str
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Vertex:
    """A block node, a device or other user of one, or a job.

    :ivar name: a block node's node-name, a device's QOM path, a job's id.
    :ivar cipher: what a node encrypts with; ``None`` for one that does not.
    """

    id: int
    name: str
    kind: str
    driver: str = ""
    place: Place | None = None
    cipher: str | None = None

    @property
    def where(self) -> str:
        """In words, where a node has its data."""
        return self.place.name if self.place else self.name


@dataclass(frozen=True, slots=True)
class Exposure:
    """An image beside that of an encrypted node, in which data of it lies.

    :ivar kind: what it is to that; ``None`` for something else.
    :ivar cipher: what it is encrypted with there; ``None`` when it is not.
    """

    kind: LinkKind | None
    place: str
    cipher: str | None = None


class BlockGraph:
    """One moment's."""

    def __init__(
        self,
        nodes: Sequence[Answer],
        graph: Answer,
        jobs: Sequence[Answer] = (),
        exports: Sequence[Answer] = (),
    ) -> None:
        """:raise MonitorError: When the answers are not what QEMU's schema says."""
        try:
            by_name = {node["node-name"]: node for node in nodes}
            self._vertices = {
                vertex["id"]: _vertex(vertex, by_name.get(vertex["name"])) for vertex in graph["nodes"]
            }
            self._children: dict[int, list[tuple[str, int]]] = defaultdict(list)
            self._parents: dict[int, list[tuple[str, int]]] = defaultdict(list)
            for edge in graph["edges"]:
                self._children[edge["parent"]].append((edge["name"], edge["child"]))
                self._parents[edge["child"]].append((edge["name"], edge["parent"]))
            self._backups = {job["id"] for job in jobs if job["type"] == "backup"}
            self._exported = {export["node-name"]: export.get("id", "") for export in exports}
        except (KeyError, TypeError, ValueError) as exc:
            raise MonitorError(f"QEMU describes its block nodes in an unknown way: {exc!r}") from exc

    def stored(self) -> list[Vertex]:
        """The nodes that have their data outside of QEMU: in a file, behind a socket, …"""
        return [vertex for vertex in self._vertices.values() if self._is_stored(vertex)]

    def volumes_over(self, stored: Vertex) -> list[tuple[Vertex, ...]]:
        """The nodes that encrypt what lies in *stored*, from it upwards; one tuple for each use of it."""
        return list(self._climb(stored.id, ()))

    def exposures(self, volume: Vertex) -> list[Exposure]:
        """Where else data of the node *volume*, which encrypts, lies or comes from, encrypted or not."""
        found = []
        for vertex in self._plaintext(volume):
            if self._is_stored(vertex):
                found.append(Exposure(self._kind(volume, self._top(vertex.id)), vertex.where))
            elif vertex.cipher and vertex.id != volume.id:
                kind = self._kind(volume, vertex.id)
                found += [Exposure(kind, image.where, vertex.cipher) for image in self._images(vertex.id)]
        return found

    def exports(self, volume: Vertex) -> list[str]:
        """The exports through which data of *volume* leaves QEMU without encryption, by their ids."""
        return [self._exported[v.name] for v in self._plaintext(volume) if v.name in self._exported]

    def devices(self) -> list[tuple[str, Vertex]]:
        """The guest's devices: libvirt's alias of each, and the node that it reads."""
        found = []
        for vertex in self._vertices.values():
            if vertex.kind == "block-backend" and (alias := _alias(vertex.name)):
                found += [(alias, self._vertices[child]) for _, child in self._children[vertex.id]]
        return found

    def devices_over(self, volume: Vertex) -> list[str]:
        """The aliases of the guest's devices whose data is that of *volume*."""
        plaintext = {vertex.id for vertex in self._plaintext(volume)}
        return [alias for alias, root in self.devices() if root.id in plaintext]

    def below(self, root: Vertex) -> list[Vertex]:
        """*root* and all that its data comes from."""
        return [self._vertices[found] for found in self._reachable(root.id)]

    def _images(self, vertex: int) -> Iterator[Vertex]:
        """Where a node has what it writes, its backing file aside."""
        for name, child in self._children[vertex]:
            if name in _CIPHERTEXT_EDGES:
                if self._is_stored(self._vertices[child]):
                    yield self._vertices[child]
                yield from self._images(child)

    def _is_stored(self, vertex: Vertex) -> bool:
        return (
            vertex.kind == "block-driver" and not self._children[vertex.id] and vertex.driver not in _DATALESS
        )

    def _climb(self, vertex: int, volumes: tuple[Vertex, ...]) -> Iterator[tuple[Vertex, ...]]:
        parents = [parent for name, parent in self._parents[vertex] if name in _CIPHERTEXT_EDGES]
        nodes = [self._vertices[parent] for parent in parents]
        uses = [node for node in nodes if node.kind == "block-driver"]
        if not uses:
            yield volumes
        for node in uses:
            yield from self._climb(node.id, (*volumes, node) if node.cipher else volumes)

    def _plaintext(self, volume: Vertex) -> list[Vertex]:
        """All that is joined to *volume* without anything that encrypts in between: where its data goes, and
        what it is put together from.
        """
        seen, pending = {volume.id}, [volume.id]
        while pending:
            vertex = pending.pop()
            near = [
                child
                for name, child in self._children[vertex]
                if not (self._vertices[vertex].cipher and name in _CIPHERTEXT_EDGES)
            ]
            near += [
                parent
                for name, parent in self._parents[vertex]
                if not (self._vertices[parent].cipher and name in _CIPHERTEXT_EDGES)
            ]
            pending += [found for found in near if found not in seen]
            seen.update(near)
        return [self._vertices[found] for found in sorted(seen)]

    def _top(self, vertex: int) -> int:
        """The node that gives the data in *vertex* its form: above it, over edges ``file``."""
        for name, parent in self._parents[vertex]:
            if name in _CIPHERTEXT_EDGES and self._vertices[parent].kind == "block-driver":
                return self._top(parent)
        return vertex

    def _kind(self, volume: Vertex, top: int) -> LinkKind | None:
        writers = [self._vertices[parent] for name, parent in self._parents[top] if name == "target"]
        if writers:
            by_backup = any(w.driver == "copy-before-write" or w.name in self._backups for w in writers)
            return LinkKind.BACKUP if by_backup else LinkKind.MIRROR
        if volume.id in self._reachable(top):
            return LinkKind.OVERLAY
        return LinkKind.BACKING if top in self._reachable(volume.id) else None

    def _reachable(self, vertex: int) -> set[int]:
        seen, pending = {vertex}, [vertex]
        while pending:
            for _, child in self._children[pending.pop()]:
                if child not in seen:
                    seen.add(child)
                    pending.append(child)
        return seen


def cipher_of(node: Answer) -> str | None:
    """What a block node encrypts with, e.g. ``aes-256-xts``, as QEMU has read it from the volume's header;
    ``None`` for one that does not encrypt.

    :param node: one of ``query-named-block-nodes``.
    """
    specific = node["image"].get("format-specific", {})
    details = specific.get("data", {})
    if specific.get("type") != "luks":
        details = details.get("encrypt")
        if details is None:
            return "unknown" if node["encrypted"] else None
        if details.get("format") != "luks":
            return f"{details.get('format')}, not LUKS"
    generator = ":".join(filter(None, (details["ivgen-alg"], details.get("ivgen-hash-alg"))))
    cipher = f"{details['cipher-alg']}-{details['cipher-mode']}"
    return cipher if generator == "plain64" else f"{cipher}-{generator}"


def place_of(filename: str) -> Place:
    """Where a node says that it has its data: a path, an ``nbd+unix`` URI, or QEMU's ``json:`` of either."""
    if filename.startswith("json:"):
        try:
            options = json.loads(filename.removeprefix("json:"))
        except ValueError:
            return Place(filename)
        server = options.get("server")
        path = options.get("filename") or options.get("path") or options.get("server.path")
        path = path or (server.get("path") if isinstance(server, dict) else None)
        return Place(str(path), Path(str(path))) if path else Place(filename)
    if filename.startswith("nbd+unix:"):
        socket = filename.partition("?socket=")[2]
        return Place(f"socket {socket}", Path(socket))
    return Place(filename, Path(filename) if os.path.isabs(filename) else None)  # noqa: PTH117 -- no path yet


def _vertex(vertex: Answer, node: Answer | None) -> Vertex:
    kind = str(vertex["type"])
    if kind != "block-driver" or node is None:
        return Vertex(vertex["id"], vertex["name"], kind)
    return Vertex(
        id=vertex["id"],
        name=vertex["name"],
        kind=kind,
        driver=node["drv"],
        place=place_of(node["file"]),
        cipher=cipher_of(node),
    )


def _alias(qom_path: str) -> str | None:
    """libvirt's alias of a device, which is its id in QEMU: ``/machine/peripheral/ALIAS/…``."""
    parts = qom_path.split("/")
    return parts[3] if parts[:3] == ["", "machine", "peripheral"] and len(parts) > 3 else None

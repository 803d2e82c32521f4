"""The block graph of a running QEMU: data flow between block nodes, and unencrypted places.

Built from the results of ``query-named-block-nodes``, ``x-debug-query-block-graph``, ``query-jobs`` and
``query-block-exports`` (QEMU ``qapi/block-core.json``). Only ``x-debug-query-block-graph``, an unstable
command of QEMU 4.0 and later, reports edges.
"""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virt_sse.errors import MonitorError
from virt_sse.system.rbd_names import PREFIX as RBD_PREFIX
from virt_sse.verification.chains import LinkKind

Answer = Mapping[str, Any]

_CIPHERTEXT_EDGES = frozenset({"file", "data-file", "header"})
"""Edges from an encrypting node to its ciphertext. The backing file, in contrast, is read unchanged."""
_MOST_LEVELS, _MOST_EDGES = 100, 10_000
_LONGEST_REASON = 200
_DATALESS = frozenset({"null-co", "null-aio"})


@dataclass(frozen=True, slots=True)
class Place:
    """Location of the data of a block node without children.

    :ivar path: the file, or the NBD server's Unix socket, if any.
    """

    name: str
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class Vertex:
    """A vertex of the graph: a block node, a job, or a user of a block node, e.g. a device.

    :ivar name: node name of a block node, QOM path of a device, or id of a job.
    :ivar cipher: cipher of an encrypting node; else ``None``.
    :ivar size: size of a node's data in bytes; ``None`` if QEMU does not tell.
    """

    id: int
    name: str
    kind: str
    driver: str = ""
    place: Place | None = None
    cipher: str | None = None
    size: int | None = None

    @property
    def where(self) -> str:
        """Location of a node's data as text."""
        return self.place.name if self.place else self.name


@dataclass(frozen=True, slots=True)
class Exposure:
    """A further image with data of a node, in addition to the node's own image.

    :ivar kind: relation of the image to the node; ``None`` if unknown.
    :ivar cipher: cipher of the data in the image; ``None`` for plaintext.
    """

    kind: LinkKind | None
    place: str
    cipher: str | None = None


class BlockGraph:
    """A snapshot of the block graph."""

    def __init__(
        self,
        nodes: Sequence[Answer],
        graph: Answer,
        jobs: Sequence[Answer] = (),
        exports: Sequence[Answer] = (),
    ) -> None:
        """Build the graph from results of QMP commands.

        :param nodes: ``query-named-block-nodes``.
        :param graph: ``x-debug-query-block-graph``.
        :param jobs: ``query-jobs``.
        :param exports: ``query-block-exports``.
        :raise MonitorError: When the results do not match QEMU's schema.
        """
        try:
            by_name = {node["node-name"]: node for node in nodes}
            self._vertices = {
                vertex["id"]: _vertex(vertex, by_name.get(vertex["name"])) for vertex in graph["nodes"]
            }
            self._children: dict[int, list[tuple[str, int]]] = defaultdict(list)
            self._parents: dict[int, list[tuple[str, int]]] = defaultdict(list)
            for edge in graph["edges"]:
                name = str(edge["name"])
                self._children[edge["parent"]].append((name, edge["child"]))
                self._parents[edge["child"]].append((name, edge["parent"]))
            self._backups = {job["id"] for job in jobs if job["type"] == "backup"}
            self._exported = {export["node-name"]: str(export.get("id", "")) for export in exports}
            self._check_edges()
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            reason = repr(exc)[:_LONGEST_REASON]
            raise MonitorError(f"QEMU describes its block nodes in an unknown format: {reason}") from exc

    def _check_edges(self) -> None:
        """Check that the graph can be followed: a QEMU process under a guest's control may describe any.

        :raise KeyError: When an edge has no vertex.
        :raise ValueError: When the graph has a cycle, or is too large to be followed.
        """
        above = {vertex: len(self._parents.get(vertex, ())) for vertex in self._vertices}
        level, seen, depth = [vertex for vertex, parents in above.items() if not parents], 0, 0
        while level:
            seen, depth, following = seen + len(level), depth + 1, []
            for vertex in level:
                for _, child in self._children.get(vertex, ()):
                    above[child] -= 1
                    if not above[child]:
                        following.append(child)
            level = following
        edges = sum(map(len, self._children.values()))
        if seen != len(self._vertices) or set(self._children) - set(above) or depth > _MOST_LEVELS:
            raise ValueError("the graph has a cycle or too many levels")
        if edges > _MOST_EDGES:
            raise ValueError(f"the graph has {edges} edges")

    def stored(self) -> list[Vertex]:
        """The nodes with data outside of QEMU, e.g. in a file or behind a socket."""
        return [vertex for vertex in self._vertices.values() if self._is_stored(vertex)]

    def volumes_over(self, stored: Vertex) -> list[tuple[Vertex, ...]]:
        """The encrypting nodes above *stored*, bottom up; a tuple for each use of *stored*.

        :raise MonitorError: When there are more uses than a graph of QEMU's has.
        """
        found = list(itertools.islice(self._climb(stored.id, ()), _MOST_EDGES + 1))
        if len(found) > _MOST_EDGES:
            raise MonitorError("QEMU describes its block nodes in a graph too large to be followed")
        return found

    def exposures(self, volume: Vertex) -> list[Exposure]:
        """All further places, encrypted or not, with data of *volume*.

        :param volume: an encrypting node, or a stored node with plaintext.
        """
        found = []
        for vertex in self._plaintext(volume):
            if self._is_stored(vertex) and vertex.id != volume.id:
                found.append(Exposure(self._kind(volume, self._top(vertex.id)), vertex.where))
            elif vertex.cipher and vertex.id != volume.id:
                kind = self._kind(volume, vertex.id)
                found += [Exposure(kind, image.where, vertex.cipher) for image in self._images(vertex.id)]
        return found

    def exports(self, volume: Vertex) -> list[str]:
        """The ids of exports through which plaintext of *volume* leaves QEMU."""
        return [self._exported[v.name] for v in self._plaintext(volume) if v.name in self._exported]

    def plaintext_nodes(self, volume: Vertex) -> list[str]:
        """Node names of the block nodes with plaintext of *volume*."""
        return [vertex.name for vertex in self._plaintext(volume) if vertex.kind == "block-driver"]

    def devices(self) -> list[tuple[str, Vertex]]:
        """The guest's devices: libvirt's alias, and the node below the device."""
        found = []
        for vertex in self._vertices.values():
            if vertex.kind == "block-backend" and (alias := _alias(vertex.name)):
                found += [(alias, self._vertices[child]) for _, child in self._children[vertex.id]]
        return found

    def devices_over(self, volume: Vertex) -> list[str]:
        """The aliases of the guest's devices with data of *volume*."""
        plaintext = {vertex.id for vertex in self._plaintext(volume)}
        return [alias for alias, root in self.devices() if root.id in plaintext]

    def below(self, root: Vertex) -> list[Vertex]:
        """*root* and all vertices below."""
        return [self._vertices[found] for found in self._reachable(root.id)]

    def _images(self, vertex: int) -> Iterator[Vertex]:
        """The stored nodes with data written by a node, without the backing file."""
        seen, pending = {vertex}, [vertex]
        while pending:
            for name, child in self._children[pending.pop()]:
                if name in _CIPHERTEXT_EDGES and child not in seen:
                    seen.add(child)
                    pending.append(child)
                    if self._is_stored(self._vertices[child]):
                        yield self._vertices[child]

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
        """All vertices connected with *volume* without encryption in between.

        Such vertices are sources or destinations of the volume's plaintext.
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
        """The format node of *vertex*: the topmost node above, following edges ``file``."""
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
    """The cipher of a block node, e.g. ``aes-256-xts``, as read by QEMU from the volume's header.

    :param node: an item of ``query-named-block-nodes``.
    :return: ``None`` for a node without encryption.
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
    """The place named by a node's filename: a path, an ``nbd+unix`` URI, or ``json:`` with a place."""
    if filename.startswith("json:"):
        try:
            options = json.loads(filename.removeprefix("json:"))
        except (ValueError, RecursionError):
            return Place(filename)
        if not isinstance(options, dict):
            return Place(filename)
        if options.get("driver") == "rbd":
            image = f"{RBD_PREFIX}{options.get('pool')}/{options.get('image')}"
            return Place(image, Path(image))
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
        return Vertex(vertex["id"], str(vertex["name"]), kind)
    return Vertex(
        id=vertex["id"],
        name=str(vertex["name"]),
        kind=kind,
        driver=str(node["drv"]),
        place=place_of(node["file"]),
        cipher=cipher_of(node),
        size=node["image"].get("virtual-size"),
    )


def _alias(qom_path: str) -> str | None:
    """libvirt's alias of a device, i.e. its id in QEMU: ``/machine/peripheral/ALIAS/…``."""
    parts = qom_path.split("/")
    return parts[3] if parts[:3] == ["", "machine", "peripheral"] and len(parts) > 3 else None

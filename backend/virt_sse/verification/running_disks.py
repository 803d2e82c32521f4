"""Checks of a running domain's disks against the block graph of QEMU."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_sse.libvirt.disk_chains import DiskChain
from virt_sse.model.ciphers import Cipher
from virt_sse.qemu import qcow2
from virt_sse.system.files import canonical
from virt_sse.system.rbd_names import is_rbd
from virt_sse.verification.graph import BlockGraph, Vertex
from virt_sse.verification.processes import has_open
from virt_sse.verification.verdict import DataPlace, DiskVerdict, Layer

GUEST_QEMU = "guest's QEMU"


@dataclass(frozen=True, slots=True)
class CopyTarget:
    """The new disk of a copy under a running guest.

    :ivar place: the image, or the NBD server's socket.
    :ivar cipher: cipher of the layer in the guest's QEMU.
    """

    place: Path
    cipher: Cipher


class RunningDisks:
    """Checks the disks in the block graph of a running domain's QEMU.

    :param secrets: ids of the secret objects in QEMU.
    :param pid: the QEMU process; ``None`` if the process is not visible, e.g. in a different PID namespace.
    """

    def __init__(self, graph: BlockGraph, secrets: Sequence[str], pid: int | None) -> None:
        self._graph = graph
        self._secrets = secrets
        self._pid = pid

    def check_ours(
        self,
        verdict: DiskVerdict,
        chain: DiskChain,
        place: Path,
        layer: Layer,
        cipher: Cipher,
        *,
        is_all: bool = True,
        copies: Collection[Path] = (),
        increments: Collection[str] = (),
        copied_to: CopyTarget | None = None,
    ) -> None:
        """Check a disk of virt-sse: QEMU must have exactly 1 volume, of *cipher*, over *place*.

        All other nodes with the disk's data, e.g. overlays and mirrors, must have the same encryption.

        :param place: the image, or the NBD server's socket.
        :param layer: facts about the volume, apart from the cipher.
        :param is_all: whether the volume is the disk's only layer of encryption.
        :param copies: the places of copies of the disk under way, with layers and keys of their own.
        :param increments: the sockets, in words, of daemons that encrypt incremental copies under way.
        :param copied_to: the new disk into which virt-sse is copying the disk.
        """
        stacks = [stack for vertex in self.stored_at(place) for stack in self._graph.volumes_over(vertex)]
        volumes = list(dict.fromkeys(stack[-1] for stack in stacks if stack))
        if problem := self.beyond_room(place):
            verdict.expect(False, problem)
        self._check_device(verdict, chain, volumes)
        verdict.expect(bool(stacks), f"the guest's QEMU does not have {place} open")
        for stack in stacks:
            if not verdict.expect(bool(stack), f"the guest's QEMU has {place} open without encryption"):
                verdict.places.append(DataPlace(f"QEMU's node over {place}, without encryption", True))
            count = len(stack)
            verdict.expect(count < 2, f"the guest's QEMU has {count} layers over {place} instead of 1")
        for volume in volumes:
            verdict.layers.append(Layer(layer.where, volume.cipher, layer.slot, layer.key, layer.detail))
            verdict.expect(
                volume.cipher == str(cipher), f"the guest's QEMU encrypts with {volume.cipher}, not {cipher}"
            )
            self._expose(
                verdict,
                chain,
                volume,
                is_all=is_all,
                copies=copies,
                increments=increments,
                copied_to=copied_to,
            )

    def check_plain(
        self, verdict: DiskVerdict, chain: DiskChain, place: Path, *, copies: Collection[Path] = ()
    ) -> None:
        """Check a disk of virt-sse that is decrypted below QEMU: QEMU has its data, and no key.

        No other image may have the disk's data, not even encrypted: its key would be in QEMU.

        :param place: the NBD server's socket.
        :param copies: the sockets of copies of the disk under way, encrypted below QEMU as well.
        """
        own = {f"socket {path}" for path in copies}  # as Place names sockets
        nodes = self.stored_at(place)
        verdict.expect(bool(nodes), f"the guest's QEMU does not have {place} open")
        is_connected = any(chain.alias in self._graph.devices_over(node) for node in nodes)
        verdict.expect(is_connected, f"the guest's device is not connected to {place}")
        for node in nodes:
            is_encrypted = any(self._graph.volumes_over(node))
            verdict.expect(not is_encrypted, f"the guest's QEMU encrypts the data at {place} itself")
            for exposure in self._graph.exposures(node):
                where = f"{exposure.kind.value if exposure.kind else 'node'} {exposure.place}"
                verdict.places.append(DataPlace(where, exposure.cipher is None))
                if exposure.place in own and exposure.cipher is None:
                    continue
                how = "is not encrypted" if exposure.cipher is None else "is encrypted by the guest's QEMU"
                verdict.expect(False, f"{where} {how}")
            self._refuse_exports(verdict, node)
            names = tuple(f"{name}-" for name in self._graph.plaintext_nodes(node))
            held = [secret for secret in self._secrets if secret.startswith(names)]
            verdict.expect(not held, f"the guest's QEMU has keys for {place}: {', '.join(held)}")

    def check_open(self, verdict: DiskVerdict, image: Path) -> None:
        """Check that QEMU's open file is the file at the path *image*; an RBD image is no file."""
        if is_rbd(image):
            return
        if verdict.expect(self._pid is not None, "the process of the guest's QEMU is not visible"):
            assert self._pid is not None  # noqa: S101 -- checked above
            verdict.expect(
                has_open(self._pid, image),
                f"the guest's QEMU has another file open than {image}: it was replaced",
            )

    def check_foreign(self, verdict: DiskVerdict, chain: DiskChain) -> bool:
        """Record the layers of a foreign disk.

        :return: whether the disk is or may be in plaintext.
        """
        below = self._below(chain)
        plain = not below
        if plain:
            verdict.layers.append(Layer(GUEST_QEMU, None, detail="no block node in QEMU: unknown"))
        for vertex in below:
            for stack in self._graph.volumes_over(vertex):
                name = vertex.where
                cipher = ", ".join(volume.cipher or "" for volume in stack) or None
                verdict.layers.append(Layer(GUEST_QEMU, cipher, detail=name))
                verdict.places.append(DataPlace(name, not stack))
                plain = plain or not stack
        return plain

    def beyond_room(self, place: Path) -> str | None:
        """Describe a disk grown past the export below QEMU, which does not grow, e.g. of a host cache.

        :param place: the NBD server's socket; an image grows by itself.
        """
        for vertex in self.stored_at(place):
            if vertex.driver != "nbd" or vertex.size is None:
                continue
            for volume in itertools.chain.from_iterable(self._graph.volumes_over(vertex)):
                if volume.driver == "qcow2" and volume.size and qcow2.full_room(volume.size) > vertex.size:
                    return (
                        f"the disk was grown to {volume.size} bytes, and the process below QEMU has room for "
                        f"{vertex.size} bytes until the domain's next start: writes may fail"
                    )
        return None

    def stored_at(self, place: Path) -> list[Vertex]:
        """List QEMU's nodes with data at *place*."""
        wanted = canonical(place)
        return [
            vertex
            for vertex in self._graph.stored()
            if vertex.place and vertex.place.path and _is_same_file(vertex.place.path, wanted)
        ]

    def places(self) -> list[Path]:
        """List the files and sockets with data of QEMU's nodes."""
        return [vertex.place.path for vertex in self._graph.stored() if vertex.place and vertex.place.path]

    def _expose(
        self,
        verdict: DiskVerdict,
        chain: DiskChain,
        volume: Vertex,
        *,
        is_all: bool,
        copies: Collection[Path],
        increments: Collection[str],
        copied_to: CopyTarget | None,
    ) -> None:
        to_copies = [link.path for link in chain.mirror if link.path and canonical(link.path) in copies]
        own = {name for path in to_copies for name in (str(path), f"socket {path}")}  # as Place names them
        links = (*chain.links, *chain.mirror, *chain.backup)
        under_disk_key = {link.place for link in links if link.disk_id == chain.disk_id}
        for exposure in self._graph.exposures(volume):
            place = f"{exposure.kind.value if exposure.kind else 'node'} {exposure.place}"
            verdict.places.append(DataPlace(place, exposure.cipher is None))
            if exposure.place in increments:
                continue
            if not verdict.expect(exposure.cipher is not None, f"{place} is not encrypted"):
                continue
            if copied_to and exposure.place in (str(copied_to.place), f"socket {copied_to.place}"):
                is_planned = exposure.cipher == str(copied_to.cipher)
                verdict.expect(is_planned, f"{place} is encrypted with {exposure.cipher}")
                continue
            verdict.expect(exposure.cipher == volume.cipher, f"{place} is encrypted with {exposure.cipher}")
            if exposure.place in own:
                continue
            verdict.expect(is_all, f"{place} has only one layer of encryption")
            verdict.expect(exposure.place in under_disk_key, f"{place} is not encrypted under the disk's key")
        self._refuse_exports(verdict, volume)

    def _refuse_exports(self, verdict: DiskVerdict, volume: Vertex) -> None:
        for export in self._graph.exports(volume):
            verdict.places.append(DataPlace(f"NBD export {export}", True))
            verdict.expect(False, f"plaintext leaves QEMU through the NBD export {export!r}")

    def _check_device(self, verdict: DiskVerdict, chain: DiskChain, volumes: Sequence[Vertex]) -> None:
        if any(chain.alias in self._graph.devices_over(volume) for volume in volumes):
            return
        for vertex in self._below(chain):
            if not all(self._graph.volumes_over(vertex)):
                name = vertex.where
                verdict.places.append(DataPlace(name, True))
                verdict.expect(False, f"the guest's device is on {name}, which is not encrypted")
        verdict.expect(False, "the guest's device is not connected to the encrypted volume")

    def _below(self, chain: DiskChain) -> list[Vertex]:
        stored = {vertex.id for vertex in self._graph.stored()}
        roots = [root for alias, root in self._graph.devices() if alias == chain.alias]
        return [vertex for root in roots for vertex in self._graph.below(root) if vertex.id in stored]


def _is_same_file(path: Path, wanted: Path) -> bool:
    return canonical(path) == wanted or (path.exists() and wanted.exists() and path.samefile(wanted))

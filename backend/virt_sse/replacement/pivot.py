"""The block graph's proof that a mirror writes to the new disk alone, before a domain pivots to this disk."""

from __future__ import annotations

from pathlib import Path

import libvirt

from virt_sse.errors import VerificationError
from virt_sse.model.ciphers import Cipher
from virt_sse.system.files import canonical
from virt_sse.verification.graph import BlockGraph, Vertex
from virt_sse.verification.monitor import block_graph


def check_target(domain: libvirt.virDomain, place: Path, cipher: Cipher, *, alias: str | None = None) -> None:
    """Check that QEMU has *place* open under exactly one LUKS volume with *cipher*.

    :param place: the image, or the NBD server's socket.
    :param alias: libvirt's alias of the guest's device, which must then be on this volume.
    :raise VerificationError: When the block graph differs.
    :raise MonitorError: When QEMU does not describe its block graph.
    """
    graph = block_graph(domain)
    wanted = canonical(place)
    stored = [each for each in graph.stored() if _path(each) == wanted]
    stacks = [stack for vertex in stored for stack in graph.volumes_over(vertex)]
    if not stacks:
        raise VerificationError(f"the guest's QEMU does not have {place} open")
    for stack in stacks:
        ciphers = [volume.cipher for volume in stack]
        if ciphers != [str(cipher)]:
            found = ", ".join(each or "" for each in ciphers) or "no encryption"
            raise VerificationError(f"the guest's QEMU has {place} open with {found}, not {cipher}")
    if alias is not None and not any(_has_device(graph, stack[-1], alias) for stack in stacks):
        raise VerificationError(f"the guest's device {alias} is not on {place}")


def _path(vertex: Vertex) -> Path | None:
    return canonical(vertex.place.path) if vertex.place and vertex.place.path else None


def _has_device(graph: BlockGraph, volume: Vertex, alias: str) -> bool:
    return alias in graph.devices_over(volume)

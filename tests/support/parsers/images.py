"""Parsers of image headers, envelopes, guests' disks, NBD replies and QEMU's answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from support import guest_disks
from support.fuzzing import Parse, Parser, always, texts
from support.guest_disks import GuestDisk, M
from support.header_seeds import ENVELOPE, LARGE_ENVELOPE, ROOM, luks_header, qcow2_image
from virt_sse.errors import EnvelopeError, ImageError, ImageFormatError, MonitorError, ToolError
from virt_sse.in_guest.inspection import inspect
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import check_name, parse_disk_size
from virt_sse.model.envelope import SLOT_BYTES, Envelope
from virt_sse.qemu import envelope_slots, image_file, image_header, img
from virt_sse.qemu.luks import Luks1Header
from virt_sse.qemu.nbd import NbdReader
from virt_sse.qemu.qcow2 import Qcow2Header
from virt_sse.verification.graph import BlockGraph, place_of

_PREFIX = struct.Struct(">8sHHQ")


def _reader(content: bytes) -> Callable[[int, int], bytes]:
    """Reads an image of :data:`ROOM` bytes that begins with *content*."""

    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert 0 <= length <= ROOM
        return content[offset : offset + length].ljust(min(length, max(0, ROOM - offset)), b"\0")

    return read


def _qcow2(content: bytes) -> None:
    offset, length = image_header.validate_content(_reader(content), ROOM, DiskFormat.QCOW2)
    assert 0 < offset < offset + length <= ROOM
    Qcow2Header.parse(lambda offset, length: content[offset : offset + length])


def _luks(content: bytes) -> None:
    offset, length = image_header.validate_content(_reader(content), ROOM, DiskFormat.RAW)
    assert (offset, length) == (0, Luks1Header.parse(content).payload_offset)


def _resealed(content: bytes) -> bytes:
    """The slot with a correct length and checksum: its body is as hostile as before."""
    body = content[_PREFIX.size :].rstrip(b"\0")[:-32][: SLOT_BYTES - _PREFIX.size - 32]
    start = content[: _PREFIX.size].ljust(_PREFIX.size, b"\0")
    magic, version, _, generation = _PREFIX.unpack(start)
    sealed = _PREFIX.pack(magic, version, min(len(body), 0xFFFF), generation) + body
    return sealed + hashlib.sha256(sealed).digest()


def _envelope(content: bytes) -> None:
    for slot in (content, _resealed(content)):
        with contextlib.suppress(EnvelopeError):
            envelope = Envelope.decode(slot)
            assert Envelope.decode(envelope.encode()) == envelope
    envelope = Envelope.decode(_resealed(content))
    _ = envelope.name


@contextlib.contextmanager
def _slots(folder: Path) -> Iterator[Parse]:
    """An image in a file, its envelope read as ``disk adopt`` reads it, and when it is to be erased."""
    path = folder / "image"

    def parse(content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content)
            file.truncate(ROOM)
        for image_format in DiskFormat:
            envelope_slots.carried_id(path, image_format)
        with image_file.opened(path) as descriptor:
            image_format = image_file.probe_format(descriptor)
            envelope_slots.read(descriptor, image_format)
            envelope_slots.read_slots(descriptor, image_format)
            assert image_file.usable_size(descriptor, image_format) > 0

    yield parse


def _nbd(content: bytes) -> None:
    ours, server = socket.socketpair()
    with ours, server:
        server.sendall(content)
        server.shutdown(socket.SHUT_WR)
        reader = NbdReader(ours, "image")
        for offset, length in ((0, 512), (max(0, reader.size - 1), 512), (1 << 70, 1), (4096, 0)):
            assert len(reader.read(offset, length)) <= length


def _guest_disk(content: bytes) -> None:
    for size in (len(content), 1 << 40):
        inspect(lambda offset, length: content[offset : offset + length].ljust(length, b"\0"), size)


def _graph(content: bytes) -> None:
    try:
        nodes, graph, jobs, exports = json.loads(content)
    except (ValueError, TypeError, RecursionError):
        return
    found = BlockGraph(nodes, graph, jobs, exports)
    for vertex in found.stored():
        for volumes in found.volumes_over(vertex):
            for volume in volumes:
                found.exposures(volume)
                found.exports(volume)
    found.devices()


def _guest_disks() -> list[bytes]:
    seeds = []
    for signature in (
        *(guest_disks.LUKS1, guest_disks.LUKS2, guest_disks.bitlocker(), guest_disks.bitlocker_to_go()),
        *(guest_disks.core_storage(), guest_disks.ext4(encrypt=True), guest_disks.md_superblock(8)),
        guest_disks.physical_volume(),
    ):
        seeds.append(signature[:8192])
        disk = GuestDisk(M)
        guest_disks.gpt(disk, [(40, 60), (64, 100)])
        disk.write(64 * 512, signature[:8192])
        seeds.append(disk.read(0, 48 << 10))
    extended = bytearray(guest_disks.mbr((0x05, 1, 40), (0x83, 4, 8)).ljust(8192, b"\0"))
    extended[512:1024] = guest_disks.mbr((0x83, 1, 2), (0x05, 1, 4))
    return [*seeds, bytes(extended)]


_GREETING = b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QH", 1000, 3)
_GRAPH = [
    [
        {
            "node-name": "n1",
            "drv": "luks",
            "file": 'json:{"server": {"path": "/run/a"}}',
            "encrypted": True,
            "image": {
                "format-specific": {
                    "type": "luks",
                    "data": {"cipher-alg": "aes-256", "cipher-mode": "xts", "ivgen-alg": "plain64"},
                }
            },
        },
        {"node-name": "n2", "drv": "file", "file": "/a", "encrypted": False, "image": {}},
    ],
    {
        "nodes": [
            {"id": 1, "name": "n1", "type": "block-driver"},
            {"id": 2, "name": "n2", "type": "block-driver"},
            {"id": 3, "name": "/machine/peripheral/d/virtio-backend", "type": "block-backend"},
        ],
        "edges": [
            {"parent": 1, "child": 2, "name": "file"},
            {"parent": 3, "child": 1, "name": "root"},
        ],
    },
    [{"id": "j", "type": "backup"}],
    [{"node-name": "n1", "id": "e"}],
]
_INFO = {
    "format": "qcow2",
    "virtual-size": 1048576,
    "encrypted": True,
    "full-backing-filename": "/a",
    "format-specific": {"type": "qcow2", "data": {"data-file": "/b", "extents": [{"filename": "/c"}]}},
}


def _info(text: str) -> None:
    found = img._image_info(text, Path("/image"))
    assert found.virtual_size >= 0
    assert isinstance(found.format, str)


PARSERS = [
    Parser(
        "qemu-img-info",
        always(lambda content: _info(content.decode(errors="replace"))),
        [json.dumps(_INFO).encode()],
        (ToolError,),
        document=True,
    ),
    Parser("qcow2-header", always(_qcow2), [qcow2_image(), qcow2_image(bitmaps=True)], (ImageFormatError,)),
    Parser("luks-header", always(_luks), [luks_header()], (ImageFormatError,)),
    Parser(
        "envelope",
        always(_envelope),
        [envelope.encode() for envelope in (*ENVELOPE, LARGE_ENVELOPE)],
        (EnvelopeError,),
        document=True,
    ),
    Parser(
        "envelope-slots",
        _slots,
        [luks_header(envelope=envelope.encode()) for envelope in ENVELOPE]
        + [qcow2_image(envelope=ENVELOPE[0].encode())],
        (ImageError,),
    ),
    Parser(
        "nbd-replies",
        always(_nbd),
        [
            _GREETING
            + struct.pack(">IIQ", 0x67446698, 0, 1)
            + bytes(512)
            + struct.pack(">IIQ", 0x67446698, 0, 2)
            + b"y"
        ],
        (ImageError,),
        words=[_GREETING, struct.pack(">I", 0x67446698)],
    ),
    Parser("guest-disk", always(_guest_disk), _guest_disks(), (ImageFormatError,)),
    Parser("block-graph", always(_graph), [json.dumps(_GRAPH).encode()], (MonitorError,), document=True),
    Parser(
        "block-node-filename",
        texts(place_of),
        [b"/a", b"nbd+unix:///x?socket=/a", _GRAPH[0][0]["file"].encode()],
    ),
    Parser("disk-name", texts(check_name), [b"disk-1"]),
    Parser("disk-size", texts(parse_disk_size), [b"10G", b"512MiB", b"1024"]),
]

"""Hostile image headers: changes to the headers of images of ours, as the storage can make them."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import Disk
from virt_sse.model.keys import Dek
from virt_sse.qemu import reading, unlocking

_CLUSTER = 65536
_LUKS_HEADER = 592
_BACKING_FORMAT, _DATA_FILE, _LUKS = 0xE2792ACA, 0x44415441, 0x0537BE77


class Qcow2:
    """The first cluster of a qcow2 image, to be changed."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)

    def put(self, offset: int, layout: str, *values: int) -> None:
        struct.pack_into(layout, self.content, offset, *values)

    def get(self, offset: int, layout: str) -> int:
        (value,) = struct.unpack_from(layout, self.content, offset)
        assert isinstance(value, int)
        return value

    def extensions(self) -> list[tuple[int, bytes]]:
        position, found = self.get(100, ">I"), []
        while kind := self.get(position, ">I"):
            length = self.get(position + 4, ">I")
            found.append((kind, bytes(self.content[position + 8 : position + 8 + length])))
            position += 8 + (length + 7) // 8 * 8
        return found

    def set_extensions(self, extensions: Sequence[tuple[int, bytes]], name: str = "") -> None:
        """Replace the extensions; a backing file's *name* follows them."""
        content = bytes(self.content[: self.get(100, ">I")])
        for kind, body in extensions:
            content += struct.pack(">II", kind, len(body)) + body.ljust((len(body) + 7) // 8 * 8, b"\0")
        content += bytes(8)
        if name:
            self.put(8, ">QI", len(content), len(name.encode()))
            content = bytes(self.content[:20]) + content[20:] + name.encode()
        self.content[: len(content)] = content


Change = Callable[[Qcow2, Path], None]


def _backing(name: str, backing_format: str = "raw") -> Change:
    def change(header: Qcow2, canary: Path) -> None:
        extensions = [*header.extensions(), (_BACKING_FORMAT, backing_format.encode())]
        header.set_extensions(extensions, name.format(canary))

    return change


def _data_file(autoclear: int) -> Change:
    def change(header: Qcow2, canary: Path) -> None:
        header.set_extensions([*header.extensions(), (_DATA_FILE, str(canary).encode())])
        header.put(72, ">Q", 4)
        header.put(88, ">Q", autoclear)

    return change


def _field(offset: int, layout: str, *values: int) -> Change:
    return lambda header, _: header.put(offset, layout, *values)


def _luks_pointer(offset: int, length: int) -> Change:
    def change(header: Qcow2, _: Path) -> None:
        pointer = struct.pack(">QQ", offset, length)
        header.set_extensions([(k, pointer if k == _LUKS else body) for k, body in header.extensions()])

    return change


def _extension(kind: int, body: bytes) -> Change:
    return lambda header, _: header.set_extensions([*header.extensions(), (kind, body)])


QCOW2: dict[str, tuple[Change, str]] = {
    "backing file": (_backing("{}"), "names a backing file"),
    "backing file by nbd": (_backing("nbd+unix:///export?socket={}"), "names a backing file"),
    "backing file by json": (
        _backing('json:{{"driver":"raw","file":{{"driver":"file","filename":"{}"}}}}'),
        "names a backing file",
    ),
    "backing file of no length": (_field(8, ">QI", 0x200, 0), "names a backing file"),
    "backing format": (_extension(_BACKING_FORMAT, b"raw"), "names a backing file"),
    "data file": (_data_file(0), "external data file"),
    "raw data file": (_data_file(2), "external data file"),
    "data file's name": (_extension(_DATA_FILE, b"/etc/shadow"), "external data file"),
    "dirty": (_field(72, ">Q", 1), "not closed cleanly"),
    "corrupt": (_field(72, ">Q", 2), "marked as corrupt"),
    "compression": (_field(72, ">Q", 8), "incompatible features 0x8"),
    "unknown feature": (_field(72, ">Q", 1 << 63), "incompatible features 0x8000000000000000"),
    "unknown extension": (_extension(0x0BADF00D, b"12345678"), "unknown header extension 0xbadf00d"),
    "two LUKS headers": (_extension(_LUKS, struct.pack(">QQ", 1 << 16, 4096)), "repeated header extension"),
    "snapshots": (_field(60, ">IQ", 1, 1 << 16), "internal snapshots"),
    "snapshots beyond counting": (_field(60, ">IQ", 0xFFFFFFFF, 1 << 62), "internal snapshots"),
    "huge L1 table": (_field(36, ">I", 0x7FFFFFFF), "L1 table"),
    "L1 table outside": (_field(40, ">Q", 1 << 50), "L1 table"),
    "L1 table in the header": (_field(40, ">Q", 0), "L1 table"),
    "L1 table at a bad offset": (_field(40, ">Q", 0x30001), "L1 table"),
    "huge refcount table": (_field(56, ">I", 0x7FFFFFFF), "refcount table"),
    "no refcount table": (_field(56, ">I", 0), "refcount table"),
    "refcount table outside": (_field(48, ">Q", 1 << 50), "refcount table"),
    "refcount bits": (_field(96, ">I", 7), "refcount table"),
    "size beyond the tables": (_field(24, ">Q", 1 << 63), "invalid size"),
    "odd size": (_field(24, ">Q", 1000), "invalid size"),
    "huge bitmaps": (_extension(0x23852875, struct.pack(">IIQQ", 1, 0, 1 << 40, 1 << 16)), "bitmaps"),
    "bitmaps outside": (_extension(0x23852875, struct.pack(">IIQQ", 1, 0, 64, 1 << 50)), "bitmaps"),
    "bitmaps cut": (_extension(0x23852875, bytes(8)), "bitmaps"),
    "cluster bits": (_field(20, ">I", 31), "damaged one"),
    "not encrypted": (_field(32, ">I", 0), "without a LUKS header"),
    "AES": (_field(32, ">I", 1), "without a LUKS header"),
    "LUKS header outside": (_luks_pointer(1 << 50, 2068480), "LUKS header outside of the file"),
    "LUKS header beyond offsets": (_luks_pointer((1 << 64) - 1, 1 << 63), "LUKS header outside of the file"),
}
"""Changes to a qcow2 header by name, each with the expected reason of the refusal."""


def _luks_length(change: int) -> Change:
    def do(header: Qcow2, _: Path) -> None:
        (body,) = (body for kind, body in header.extensions() if kind == _LUKS)
        offset, length = struct.unpack(">QQ", body)
        _luks_pointer(offset, length + change)(header, Path())

    return do


QCOW2["LUKS header too long"] = _luks_length(1 << 62), "LUKS"
QCOW2["LUKS header too short"] = _luks_length(-4096), "length differs"

LUKS: dict[str, tuple[int, str, int, str]] = {
    "iterations of a keyslot": (208 + 4, ">I", 0xFFFFFFFF, "too slow to open"),
    "iterations of an unused keyslot": (208 + 48 + 4, ">I", 0x7FFFFFFF, "too slow to open"),
    "iterations of the digest": (164, ">I", 0xFFFFFFFF, "too slow to open"),
    "iterations of the digest, just too many": (164, ">I", 499_500, "too slow to open"),
    "state of a keyslot": (208, ">I", 1, "damaged keyslot"),
    "stripes": (208 + 44, ">I", 3999, "stripes"),
    "payload within the keyslots": (104, ">I", 8, "unexpected offsets"),
    "payload beyond": (104, ">I", 0xFFFFFFFF, "unexpected offsets"),
    "keyslot beyond": (208 + 40, ">I", 0xFFFFFFFF, "unexpected offsets"),
    "key length": (108, ">I", 0xFFFFFFFF, "unexpected offsets"),
    "cipher": (8, ">I", 0x6E756C6C, "with the cipher 'null"),  # "null"
    "hash": (72, ">I", 0x73686135, "with the hash 'sha5"),
    "version": (6, ">H", 2, "LUKS version 2"),
}
"""Changes to a LUKS header by name: offset, layout, value, and the expected reason of the refusal."""


@dataclass(frozen=True, slots=True)
class Header:
    """A header within an image: of the file, or of the inner layer of a double disk.

    :ivar outer: DEKs of the layers around; empty for the header of the file.
    """

    disk: Disk
    outer: Sequence[Dek] = ()

    def change(self, name: str, canary: Path) -> str:
        """Make the change *name* of :data:`QCOW2` or :data:`LUKS`: the expected reason of the refusal.

        :param canary: the file for the header to name.
        """
        if name in QCOW2:
            header = Qcow2(self._read(0, _CLUSTER))
            change, reason = QCOW2[name]
            change(header, canary)
            self._write(0, bytes(header.content[:4096]))
            return reason
        offset, layout, value, reason = LUKS[name]
        position = 0
        if self.disk.format is DiskFormat.QCOW2:
            header = Qcow2(self._read(0, _CLUSTER))
            (body,) = (body for kind, body in header.extensions() if kind == _LUKS)
            (position, _) = struct.unpack(">QQ", body)
        content = bytearray(self._read(position, 1024))
        assert content.startswith(b"LUKS")
        struct.pack_into(layout, content, offset, value)
        self._write(position, bytes(content))
        return reason

    def _read(self, offset: int, length: int) -> bytes:
        if self.outer:
            with reading.plaintext(self.disk.path, self.disk.format, self.outer) as reader:
                return reader.read(offset, length)
        with self.disk.path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)

    def _write(self, offset: int, content: bytes) -> None:
        if not self.outer:
            with self.disk.path.open("r+b") as file:
                os.pwrite(file.fileno(), content, offset)
            return
        source = self.disk.path.with_suffix(".new-header")
        source.write_bytes(content)
        with unlocking.secrets_for(self.outer) as (secrets, descriptors):
            subprocess.run(
                ["qemu-io", *secrets, "-c", f"write -q -s {source} {offset} {len(content)}"]
                + [
                    "--image-opts",
                    unlocking.image_options(self.disk.path, self.disk.format, len(self.outer)),
                ],
                pass_fds=descriptors,
                check=True,
                stdout=subprocess.DEVNULL,
            )
        source.unlink()


class Canary:
    """A file of root alone, which no hostile header may make anyone read, change or give away."""

    CONTENT = b"root's own secret, which no guest reads\n" * 100

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(self.CONTENT)
        path.chmod(0o600)
        os.utime(path, ns=(0, path.stat().st_mtime_ns))  # relatime: the next read moves the access time
        self._before = self._state()

    def _state(self) -> tuple[int, ...]:
        status = self.path.stat()
        fields = (status.st_uid, status.st_gid, status.st_mode, status.st_size)
        return (*fields, status.st_mtime_ns, status.st_ctime_ns, status.st_atime_ns)

    def assert_untouched(self) -> None:
        """Check that the file was not read, changed or given away."""
        assert self._state() == self._before
        assert self.path.read_bytes() == self.CONTENT
        os.utime(self.path, ns=(0, self.path.stat().st_mtime_ns))
        self._before = self._state()

"""Reading single bytes of an image as its guest sees them, also while a domain has it open.

A qemu-storage-daemon opens the image, read-only and without taking a lock, and its plaintext comes through a
socket that has no name. It is ready in a hundredth of a second, and a read takes 50 µs; a ``qemu-img`` for
each read would take as long as the daemon's start.

Of an image that a domain writes to, what the guest has flushed is there; later writes are there or not.
"""

from __future__ import annotations

import contextlib
import json
import socket
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from virt_sse.errors import ImageError, ToolError
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import img
from virt_sse.qemu.nbd import NbdReader
from virt_sse.system.tools import running

_EXPORT = "image"


@contextlib.contextmanager
def plaintext(path: Path, image_format: DiskFormat, deks: Sequence[Dek]) -> Iterator[NbdReader]:
    """The content of the encrypted image at *path*.

    :raise ImageError: When it is damaged, or cannot be read.
    :raise ToolError: When *deks* do not open it.
    """
    with img.keys_to(path, image_format, deks) as (secrets, descriptors):
        node: dict[str, object] = {"driver": "file", "filename": str(path)}
        for number in reversed(range(len(deks))):
            node = {"driver": image_format.qemu_driver, "file": node}
            if image_format is DiskFormat.QCOW2:
                node["encrypt"] = {"format": "luks", "key-secret": f"dek{number}"}
            else:
                node["key-secret"] = f"dek{number}"
        with _served(node, secrets, descriptors) as reader:
            yield reader


@contextlib.contextmanager
def unencrypted(path: Path, image_format: str) -> Iterator[NbdReader]:
    """The content of the image, or block device, at *path*, which has QEMU's format *image_format*.

    :raise ImageError: When it cannot be read.
    :raise ToolError: When it is no such image.
    """
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        raise ImageError(f"cannot read {path}: {exc.strerror}") from exc
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        raise ImageError(f"{path} is neither a file nor a block device")
    driver = "host_device" if stat.S_ISBLK(mode) else "file"
    file = {"driver": driver, "filename": str(path)}
    with _served({"driver": image_format, "file": file}, [], []) as reader:
        yield reader


@contextlib.contextmanager
def _served(
    node: dict[str, object], secrets: Sequence[str], descriptors: Sequence[int]
) -> Iterator[NbdReader]:
    """What the block node *node* holds, by way of a daemon of its own."""
    node |= {"node-name": _EXPORT, "read-only": True, "force-share": True}
    export = f"type=nbd,id={_EXPORT},node-name={_EXPORT},name={_EXPORT},writable=off"
    with _connected_socket() as (listening, connection):
        arguments = ["qemu-storage-daemon", *secrets, "--blockdev", json.dumps(node)]
        arguments += ["--nbd-server", f"addr.type=fd,addr.str={listening.fileno()}", "--export", export]
        with running(arguments, pass_fds=[*descriptors, listening.fileno()]) as daemon:
            listening.close()  # or a daemon that fails would leave the connection waiting
            try:
                reader = NbdReader(connection, _EXPORT)
            except ImageError as exc:
                raise (daemon.failure() or exc) from exc
            yield reader


@contextlib.contextmanager
def _connected_socket() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listening Unix socket, and the one connection that there can be to it: its name is gone."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as connection:
        with TemporaryDirectory(prefix="virt-sse-") as folder:
            address = f"{folder}/nbd"
            try:
                listening.bind(address)
                listening.listen(1)
                connection.connect(address)
            except OSError as exc:
                raise ToolError(f"no socket can be made in {folder}: {exc.strerror}") from exc
        yield listening, connection

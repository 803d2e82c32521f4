"""Random access to the plaintext of an image, also while a domain has the image open.

A qemu-storage-daemon opens the image read-only, without locks, and serves the plaintext on an unnamed socket.
The daemon is ready within 10 ms, and a read takes 50 µs; a ``qemu-img`` process per read would each take as
long as the daemon's start.

If a domain is writing to the image, all data flushed by the guest is visible; later writes may be.
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
    """Open the plaintext of the encrypted image at *path*.

    :raise ImageError: When the image is damaged or cannot be read.
    :raise ToolError: When *deks* do not unlock the image.
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
def unencrypted(path: Path, image_format: str, *, descriptor: int | None = None) -> Iterator[NbdReader]:
    """Open the content of the unencrypted image or block device at *path*.

    :param image_format: QEMU's name of the format.
    :param descriptor: descriptor to open the image by, without a backing file.
    :raise ImageError: When *path* cannot be read.
    :raise ToolError: When the image is not in *image_format*.
    """
    if descriptor is not None:
        node = json.loads(img.without_backing(descriptor, image_format))
        with _served(node, [], [descriptor]) as reader:
            yield reader
        return
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
    """Open the content of the block node *node* in a new storage daemon."""
    node |= {"node-name": _EXPORT, "read-only": True, "force-share": True}
    export = f"type=nbd,id={_EXPORT},node-name={_EXPORT},name={_EXPORT},writable=off"
    with _connected_socket() as (listening, connection):
        arguments = ["qemu-storage-daemon", *secrets, "--blockdev", json.dumps(node)]
        arguments += ["--nbd-server", f"addr.type=fd,addr.str={listening.fileno()}", "--export", export]
        with running(arguments, pass_fds=[*descriptors, listening.fileno()]) as daemon:
            listening.close()  # else a failure of the daemon would leave the connection waiting
            try:
                reader = NbdReader(connection, _EXPORT)
            except ImageError as exc:
                raise (daemon.failure() or exc) from exc
            yield reader


@contextlib.contextmanager
def _connected_socket() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listening Unix socket and its only possible connection: the socket's name is removed."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as connection:
        with TemporaryDirectory(prefix="virt-sse-") as folder:
            address = f"{folder}/nbd"
            try:
                listening.bind(address)
                listening.listen(1)
                connection.connect(address)
            except OSError as exc:
                raise ToolError(f"cannot make a socket in {folder}: {exc.strerror}") from exc
        yield listening, connection

"""Linked clones at the level of QEMU: images, and storage daemons that have them open."""

from __future__ import annotations

import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from virt_sse.errors import MonitorSilentError
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.qemu import conversion, formatting
from virt_sse.qemu.formatting import Volume
from virt_sse.qemu.reading import plaintext
from virt_sse.qemu.storage_daemon import StorageDaemon, arguments
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.system.progress import silent

M = 1 << 20
CONTENT = (b"what the image has, again and again. " * M)[: M + 512]
QCOW2 = DiskFormat.QCOW2
CIPHERS = (AES_256_XTS, AES_256_CBC)
"""Of the volumes, innermost first."""


@dataclass(frozen=True, slots=True)
class Keyed:
    """An image and its DEKs."""

    path: Path
    format: DiskFormat
    deks: tuple[Dek, ...]

    def read(self, base: BaseImage | None = None) -> bytes:
        with plaintext(self.path, self.format, self.deks, base=base) as reader:
            return reader.read(0, reader.size)


def make(path: Path, image_format: str, *, double: bool, size: int) -> Keyed:
    deks = (Dek.generate(), Dek.generate()) if double else (Dek.generate(),)
    volumes = [Volume(cipher, dek) for cipher, dek in zip(CIPHERS, deks, strict=False)]
    formatting.make(path, DiskFormat(image_format), size, volumes)
    return Keyed(path, DiskFormat(image_format), deks)


def filled(folder: Path, image_format: str, *, double: bool) -> BaseImage:
    """An image with :data:`CONTENT`."""
    plain = folder / "plain"
    plain.write_bytes(CONTENT)
    made = make(folder / f"base.{image_format}", image_format, double=double, size=len(CONTENT))
    with plain.open("rb") as source:
        conversion.encrypt_from(
            plain, "raw", made.path, made.format, made.deks, silent, descriptor=source.fileno()
        )
    return BaseImage(uuid.uuid4(), made.path, made.format, made.deks)


@contextmanager
def daemon(clone: Keyed, base: BaseImage | None) -> Iterator[tuple[StorageDaemon, Path]]:
    """A storage daemon with a clone: its monitor, and the socket of the export ``disk``."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="virt-sse-")))
        made = StorageDaemon(folder / "qmp")
        try:
            stack.enter_context(_started(folder))
            made.open_volumes(clone.path, clone.format, clone.deks, "disk", base=base)
        except MonitorSilentError:  # a few in a thousand daemons end before the greeting of their monitor
            stack.enter_context(_started(folder))
            made.open_volumes(clone.path, clone.format, clone.deks, "disk", base=base)
        yield made, folder / "nbd"


@contextmanager
def _started(folder: Path) -> Iterator[None]:
    """A storage daemon that listens at ``qmp`` and ``nbd``."""
    with ExitStack() as stack:
        numbers = []
        for name in ("qmp", "nbd"):
            (folder / name).unlink(missing_ok=True)
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(str(folder / name))
            listening.listen()
            numbers.append(listening.fileno())
        process = subprocess.Popen(arguments(*numbers), pass_fds=numbers)
    with process:
        try:
            yield
        finally:
            process.kill()


def io(nbd: Path, command: str) -> str:
    uri = f"nbd+unix:///disk?socket={nbd}"
    done = subprocess.run(["qemu-io", "-f", "raw", "-c", command, uri], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

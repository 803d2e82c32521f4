"""A guest's memory to and from libvirt through a FIFO: libvirt's save image, never in a file.

libvirt writes the image into any file that is no regular file without seeking, but at the end opens the path
again and overwrites the image's header (``qemuSaveImageCreate``). Once libvirt has opened the FIFO, an empty
regular file takes the FIFO's name: libvirt's last write shows there that the image is complete.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self
from uuid import UUID
from xml.sax.saxutils import quoteattr

import libvirt

from virt_sse.errors import LibvirtError
from virt_sse.libvirt import domains
from virt_sse.system.files import PRIVATE_FILE, private_folder

_PARTIAL = b"LibvirtQemudPart"
_COMPLETE = b"LibvirtQemudSave"
"""The magic of libvirt's save image before and after libvirt completes the image."""
_FLAGS = libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
_AT_ONCE = 1 << 20
_POLL_SECONDS = 0.01


def receive(domain: libvirt.virDomain, folder: Path, write: Callable[[bytes], None]) -> None:
    """Hand the memory of a paused domain, which stays paused and intact, to *write*.

    By a snapshot of the memory alone. ``virDomainSave`` would end the domain before the caller has stored the
    last bytes.

    :param folder: for the FIFO; made, and removed at the end.
    :param write: may raise: libvirt then gives up.
    :raise libvirt.libvirtError: When libvirt refuses or fails.
    :raise LibvirtError: When libvirt did not complete the image, or the FIFO cannot be made.
    :raise OSError: What *write* raises.
    """
    targets = [disk.target for disk in domains.definition(domain).guest_data.disks()]
    with _fifo(folder) as path:
        names = "".join(f"<disk name={quoteattr(each)} snapshot='no'/>" for each in targets if each)
        xml = (
            f"<domainsnapshot><memory snapshot='external' file={quoteattr(str(path))}/>"
            f"<disks>{names}</disks></domainsnapshot>"
        )
        with _Receiver(path, write) as receiver:
            try:
                domain.snapshotCreateXML(xml, _FLAGS)
            except libvirt.libvirtError:
                receiver.stop()
                raise
            receiver.join()
        if path.is_fifo() or path.read_bytes()[: len(_COMPLETE)] != _COMPLETE:
            raise LibvirtError(f"libvirt has not completed the memory image of domain {domain.name()!r}")


def send(connection: libvirt.virConnect, domain_id: UUID, folder: Path, chunks: Iterator[bytes]) -> None:
    """Let libvirt restore a domain, paused, from the memory image in *chunks*.

    :param folder: for the FIFO; made, and removed at the end.
    :raise libvirt.libvirtError: When libvirt refuses or fails.
    :raise VirtSseError: What *chunks* raises. A domain restored from a part of *chunks* is ended.
    """
    with _fifo(folder) as path, _Sender(path, chunks) as sender:
        try:
            connection.restoreFlags(str(path), None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
        except libvirt.libvirtError:
            sender.stop()
            raise
        try:
            sender.join()
        except BaseException:
            if (domain := domains.find(connection, domain_id)) is not None:
                domain.destroy()
            raise


@contextlib.contextmanager
def _fifo(folder: Path) -> Iterator[Path]:
    path = folder / "memory"
    shutil.rmtree(folder, ignore_errors=True)  # left behind by a killed command
    try:
        private_folder(folder.parent)
        private_folder(folder)
        os.mkfifo(path, PRIVATE_FILE)
    except OSError as exc:
        raise LibvirtError(f"cannot make {path}: {exc.strerror}") from exc
    try:
        yield path
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Worker:
    """A thread at our end of the FIFO, while this thread waits for libvirt. Raises what the thread raised."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-image", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the thread, and raise its error: the cause of libvirt's."""
        self._stopped.set()
        self.join()

    def join(self) -> None:
        """Wait for the end of the image."""
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as exc:  # noqa: BLE001 -- raised again in the other thread
            self._error = exc

    def _work(self) -> None:
        raise NotImplementedError


class _Receiver(_Worker):
    """Reads what libvirt writes; the read end is open before libvirt is asked."""

    def __init__(self, path: Path, write: Callable[[bytes], None]) -> None:
        super().__init__(path)
        self._write = write
        self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def _work(self) -> None:
        try:
            readable = select.poll()
            readable.register(self._descriptor, select.POLLIN)
            is_first = True
            while True:
                if not readable.poll(_POLL_SECONDS * 1000):
                    if self._stopped.is_set():
                        return
                    continue
                content = os.read(self._descriptor, _AT_ONCE)
                if not content:
                    return
                if is_first:
                    self._replace_fifo()
                    is_first = False
                self._write(content)
        finally:
            os.close(self._descriptor)

    def _replace_fifo(self) -> None:
        """Give the FIFO's name to a regular file, for libvirt's header of the complete image."""
        head = self._path.with_name("head")
        os.close(os.open(head, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
        head.rename(self._path)


class _Sender(_Worker):
    """Writes what libvirt reads, with the header of a complete image."""

    def __init__(self, path: Path, chunks: Iterator[bytes]) -> None:
        super().__init__(path)
        self._chunks = chunks

    def _work(self) -> None:
        descriptor = self._opened()
        if descriptor is None:
            return
        with os.fdopen(descriptor, "wb", buffering=0) as file, contextlib.suppress(BrokenPipeError):
            is_first = True
            for chunk in self._chunks:
                content = memoryview(chunk)
                if is_first and chunk.startswith(_PARTIAL):
                    content = memoryview(_COMPLETE + chunk[len(_PARTIAL) :])
                is_first = False
                while content:
                    content = content[file.write(content) :]

    def _opened(self) -> int | None:
        """The FIFO, once libvirt has it open; ``None`` if libvirt gave up first."""
        while not self._stopped.is_set():
            with contextlib.suppress(OSError):  # ENXIO: libvirt does not have the FIFO open yet
                descriptor = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                os.set_blocking(descriptor, True)
                return descriptor
            time.sleep(_POLL_SECONDS)
        return None

"""The paths of all images in a file, for programs that cannot open the store: the hook script, the inventory.

The file has each image of the store, and may have further paths: a path is added once the store has the disk,
before the image exists, and removed at leisure. Whoever finds a path asks the store.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from virt_sse.system.files import PRIVATE_FILE, private_folder, sync_folder, write_private
from virt_sse.system.rbd_names import PREFIX as RBD_PREFIX

_log = logging.getLogger(__name__)

_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&apos;", '"': "&quot;"})
"""As in libvirt's ``virBufferEscapeString``."""
_NAMED = re.compile(r"<(?:source|target)\b[^>]*?\b(?:file|dev|volume|name)=('[^']*')")


class ImagePaths:
    """The file, mode 0600: two lines for each image, as libvirt's XML names a file and a volume of a pool."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._read: tuple[tuple[int, int, int], frozenset[str]] = ((0, 0, 0), frozenset())
        self._replaced: tuple[int, int] | None = None

    def add(self, path: Path) -> None:
        """Add the path of an image. A failure is logged: the agent adds the path later."""
        try:
            self.append([path])
        except OSError as exc:
            _log.warning("cannot add %s to %s: %s", path, self.file, exc.strerror)

    def append(self, paths: Iterable[Path]) -> None:
        """Add the paths of images.

        :raise OSError: When the file cannot be written.
        """
        with self._locked():
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            with os.fdopen(os.open(self.file, flags, PRIVATE_FILE), "ab") as file:
                size = os.fstat(file.fileno()).st_size
                is_torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"  # by a full disk
                file.write(b"\n" * is_torn + _lines(paths).encode())
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self.file.parent)

    def provide(self, read: Callable[[], Iterable[Path]]) -> None:
        """Make the file, if missing, as :meth:`replace` does. A failure is logged."""
        if not self.file.exists():
            try:
                self.replace(read)
            except OSError as exc:
                _log.warning("cannot write %s: %s", self.file, exc.strerror)

    def replace(self, read: Callable[[], Iterable[Path]]) -> None:
        """Replace the content with the paths of the store; a file with these paths stays untouched.

        :param read: reads the paths; called while no other process adds a path.
        :raise OSError: When the file cannot be written.
        """
        with self._locked():
            content = _lines(sorted(read()))
            if not self._has(content):
                write_private(self.file, content.encode())
            status = self.file.stat()
            self._replaced = status.st_ino, status.st_size

    def is_kept(self) -> bool:
        """Whether the file is the one of the last :meth:`replace`, with at most further paths since."""
        try:
            status = self.file.stat()
        except OSError:
            return False
        inode, size = self._replaced or (0, 0)
        return status.st_ino == inode and status.st_size >= size

    def _has(self, content: str) -> bool:
        try:
            return self.file.read_text("utf-8") == content
        except (OSError, ValueError):
            return False

    def mentioned(self, xml: str) -> bool:
        """Whether a domain's XML names a path of the file, or a volume with the name of an image."""
        known = self._known()
        return bool(known) and any(name in known or f"volume={name}" in known for name in _NAMED.findall(xml))

    def has_volume(self, name: str) -> bool:
        """Whether an image has this name in its folder."""
        return f"volume={_quoted(name)}" in self._known()

    def among(self, paths: Collection[Path]) -> set[Path]:
        """The paths that are in the file."""
        known = self._known()
        return {path for path in paths if _quoted(_in_xml(path)) in known}

    def _known(self) -> frozenset[str]:
        """The lines; read again if the file has changed. Empty if the file cannot be read."""
        try:
            status = self.file.stat()
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            if version != self._read[0]:
                self._read = (version, frozenset(self.file.read_text("utf-8").splitlines()))
        except (OSError, ValueError):
            return frozenset()
        return self._read[1]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        folder = os.open(private_folder(self.file.parent), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def _lines(paths: Iterable[Path]) -> str:
    return "".join(f"{_quoted(_in_xml(path))}\nvolume={_quoted(path.name)}\n" for path in paths)


def _in_xml(path: Path) -> str:
    """An image as libvirt's XML names it."""
    return str(path).removeprefix(RBD_PREFIX)


def _quoted(value: str) -> str:
    """A value as in an attribute of libvirt's XML."""
    return f"'{value.translate(_ESCAPES)}'"

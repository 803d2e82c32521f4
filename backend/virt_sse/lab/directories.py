"""Throw-away directories of lab hosts and vaults: made, locked, swept.

A directory is flock'ed during its owner's lifetime; the kernel drops the lock however the owner ends. Hence
an unlocked directory was left by a killed run.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import LabError

PREFIX = "virt-sse-lab-"
_LONGEST_SOCKET = 40
"""Bytes reserved for a socket's path below a directory; an ``AF_UNIX`` address holds 107 (unix(7))."""


@dataclass(frozen=True, slots=True)
class LabDirectory:
    """A locked directory.

    :ivar lock: file descriptor; the lock lasts until the last copy of the descriptor is closed.
    """

    path: Path
    lock: int

    def remove(self) -> None:
        """Remove the directory with its content, and release the lock."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self.lock)


class OwnedDirectory:
    """The directory of a server of the lab: made at the server's start, removed at its end.

    :param base: the folder to make the directory in.
    :param owner: the server, for messages: ``the lab vault``.
    """

    def __init__(self, base: Path, owner: str) -> None:
        self._base, self._owner = base, owner
        self._made: LabDirectory | None = None

    def make(self) -> None:
        """Make the directory, and remove those left by killed runs.

        :raise LabError: As :func:`create`.
        """
        sweep(self._base)
        self._made = create(self._base)

    @property
    def path(self) -> Path:
        """The directory.

        :raise LabError: When the directory has not been made, or was removed.
        """
        if self._made is None:
            raise LabError(f"{self._owner} has not been made")
        return self._made.path

    def remove(self) -> None:
        """Remove the directory with its content, if made."""
        made, self._made = self._made, None
        if made is not None:
            made.remove()


def create(base: Path) -> LabDirectory:
    """Make and lock a new directory below *base*, with mode 0711 for access by QEMU's user.

    :raise LabError: When *base* is too long for the paths of sockets, is hidden by a lab host's own mounts,
        or cannot be written.
    """
    base = base.resolve()
    if any(base.is_relative_to(hidden) for hidden in ("/run", "/var/lib/libvirt", "/etc/libvirt")):
        raise LabError(f"a lab host cannot be in {base}: the host's own mounts hide this directory")
    if len(os.fsencode(base)) + len(f"/{PREFIX}xxxxxxxx/") + _LONGEST_SOCKET > 107:
        raise LabError(f"{base} is too long a path for the Unix sockets of a lab host")
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        except OSError as exc:
            raise LabError(f"cannot make a lab host's directory in {base}: {exc.strerror}") from exc
        lock = _lock(path)
        if lock is not None:
            path.chmod(0o711)
            return LabDirectory(path, lock)
        # Another process swept the directory before it was locked.


def sweep(base: Path) -> list[Path]:
    """Remove directories left in *base* by killed runs of this user.

    :return: the removed directories.
    """
    removed = []
    for path in sorted(base.glob(f"{PREFIX}*")):
        lock = _lock(path)
        if lock is not None:
            LabDirectory(path, lock).remove()
            removed.append(path)
    return removed


def _lock(path: Path) -> int | None:
    """Lock the directory *path*; ``None`` when owned by another user, locked, or gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        opened, present = os.fstat(descriptor), path.lstat()
        if opened.st_uid == os.geteuid() and os.path.samestat(opened, present):
            return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None

"""Unix sockets between a guest's QEMU and stage processes: their folders, listening, and NBD's greeting."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import StageError
from virt_sse.libvirt.users import ROOT, User
from virt_sse.qemu.nbd_protocol import MAGIC
from virt_sse.system.files import shared_folder

_BACKLOG = 8
_LONGEST_SOCKET_PATH = 107
"""Linux, unix(7): ``sun_path`` less its zero byte."""
_GREETING_SECONDS = 10.0
_GUEST, _STAGES = "guest", "stages"


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """A Unix socket to listen at; *user* and root may connect."""

    path: Path
    user: User


def guest_socket(folder: Path) -> Path:
    """The socket for a guest's QEMU, in a disk's *folder* of sockets."""
    return folder / _GUEST / "nbd"


def inner_socket(folder: Path, name: str) -> Path:
    """The socket between two stage processes, in a disk's *folder* of sockets."""
    return folder / _STAGES / name


def gated_socket(folder: Path) -> Path:
    """The socket of a stage process behind a gate, in the disk's private *folder*."""
    return folder / "nbd"


def make_folders(folder: Path, qemu: User, storage: User) -> None:
    """Make a disk's *folder* of sockets; QEMU and stage processes may pass through, not create files.

    :raise OSError: When that fails.
    """
    for path, group, mode in (
        (folder.parent, ROOT.gid, 0o711),
        (folder, ROOT.gid, 0o711),
        (folder / _GUEST, qemu.gid, 0o710),
        (folder / _STAGES, storage.gid, 0o710),
    ):
        shared_folder(path.parent)
        path.mkdir(mode=0o700, exist_ok=True)
        os.chown(path, ROOT.uid, group)
        path.chmod(mode)


@contextlib.contextmanager
def listening(place: ListeningSocket) -> Iterator[int]:
    """Descriptor of a new socket that listens at *place*; an existing file is replaced.

    :raise OSError: When the socket cannot be made.
    :raise StageError: When the path is too long.
    """
    path = place.path
    if (excess := len(os.fsencode(path)) - _LONGEST_SOCKET_PATH) > 0:
        raise StageError(f"{path} is too long for a socket, by {excess} bytes")
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        os.chown(path, place.user.uid, place.user.gid)
        listener.listen(_BACKLOG)
        yield listener.fileno()


def await_greeting(path: Path) -> None:
    """Return once an NBD server greets at *path*.

    :raise StageError: When the server ends before, or does not greet in time.
    """
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(_GREETING_SECONDS)
            client.connect(str(path))
            if client.recv(len(MAGIC), socket.MSG_WAITALL) == MAGIC:
                return
    except OSError:
        pass
    raise StageError("no NBD server answers")

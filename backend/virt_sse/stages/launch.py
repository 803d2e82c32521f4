"""Becomes a stage's process: takes its locks, gives up root, and runs the program.

Run as a script, with the standard library alone. Its arguments: one JSON object with

- ``ready``: the descriptor to write to once the locks are taken; then what started this may go on.
- ``lock``: the descriptor of the stage's lock file; its POSIX lock outlives exec, and ends with the process.
- ``image``: where not null, the descriptor of an image that the program does not lock as QEMU does.
- ``uid``, ``gid``: whom to become.
- ``listening``: where not null, a listening socket for the program: its descriptor 3 (sd_listen_fds(3)).
- ``environment``: what to set.
- ``command``: the program, by its absolute path, and its arguments.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import struct
import sys
import time

_FIRST_LISTENING, _FREE = 3, 64
_PR_SET_NO_NEW_PRIVS = 38
_POLL_SECONDS = 0.0005
_FLOCK = struct.Struct("hhqqi4x")
_QEMU_USED = (100, 101, 103)
"""QEMU ``block/file-posix.c``: reads consistently, writes, resizes, …"""
_QEMU_UNSHARED = (201, 203)
"""… and nobody else may write or resize."""


def main() -> None:
    asked = json.loads(sys.argv[1])
    starter = os.getpid()
    if os.fork():
        os._exit(0)  # the program belongs to nobody here, and leaves no zombie
    os.setsid()
    while os.getppid() == starter:  # nbdkit, handed a socket, ends when its parent does: PR_SET_PDEATHSIG
        time.sleep(_POLL_SECONDS)
    environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"} | asked["environment"]
    if asked["listening"] is not None:
        _hand_over(asked)
        environment |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    fcntl.lockf(asked["lock"], fcntl.LOCK_EX | fcntl.LOCK_NB)
    if asked["image"] is not None:
        _lock_like_qemu(asked["image"])
    os.write(asked["ready"], b"1")
    os.close(asked["ready"])
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up the right to new privileges")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(asked["gid"])
        os.setuid(asked["uid"])
    os.chdir("/")
    os.execve(asked["command"][0], asked["command"], environment)  # noqa: S606 -- no shell is wanted


def _hand_over(asked: dict[str, int]) -> None:
    """Make the socket descriptor 3. Before any lock is taken: to close what is 3 now would release it."""
    for name in ("lock", "image", "ready"):
        if asked[name] == _FIRST_LISTENING:
            asked[name] = fcntl.fcntl(asked[name], fcntl.F_DUPFD, _FREE)
    os.dup2(asked["listening"], _FIRST_LISTENING)


def _lock_like_qemu(image: int) -> None:
    """Let QEMU and its tools see that the image is written to, as long as the descriptor is open."""
    for byte in (*_QEMU_USED, *_QEMU_UNSHARED):
        fcntl.fcntl(image, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    for byte in (*(byte + 100 for byte in _QEMU_USED), *(byte - 100 for byte in _QEMU_UNSHARED)):
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(image, fcntl.F_OFD_GETLK, asked))
        if kind != fcntl.F_UNLCK:
            raise OSError("the image is in use by a running domain or another QEMU process")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error.strerror or error}")

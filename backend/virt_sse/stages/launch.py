"""Becomes a stage process: takes the locks, gives up root and all rights not needed, and runs the program.

Run as a script, with the standard library alone. The argument is a JSON object with

- ``ready``: the descriptor to write to once the locks are taken, the starter waits for this.
- ``lock``: the descriptor of the process's lock file; the POSIX lock outlives exec and ends with the process.
- ``image``: null, or the descriptor of an image to lock, for programs without QEMU's image locking.
- ``uid``, ``gid``: the user and group that run the program.
- ``listening``: null, or a listening socket: the program's descriptor 3 (sd_listen_fds(3)).
- ``threads``: null, or the maximum number of threads of the user.
- ``filter``: null, or a seccomp filter, a BPF program in base64.
- ``environment``: environment variables to set.
- ``command``: the program, by absolute path, and the program's arguments.
"""

from __future__ import annotations

import base64
import ctypes
import fcntl
import json
import os
import resource
import struct
import sys
import time

_FIRST_LISTENING, _FREE = 3, 64
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWNET = 0x40000000
_MOST_MEMORY = 4 << 30
"""Bytes of private memory. Four connections with 64 requests of 1 MiB each take 0.8 GiB in a host cache."""
_MOST_FILES = 1024
_POLL_SECONDS = 0.0005
_FLOCK = struct.Struct("hhqqi4x")
_QEMU_USED = (100, 101, 103)
"""QEMU ``block/file-posix.c``: locks for consistent reads, writes and resizes."""
_QEMU_UNSHARED = (201, 203)
"""Likewise: no other process may write or resize."""

_INSTRUCTION_LENGTH = 8


class _Program(ctypes.Structure):
    """``struct sock_fprog``: the number of instructions, and their address."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def main() -> None:
    asked = json.loads(sys.argv[1])
    starter = os.getpid()
    if os.fork():
        os._exit(0)  # the program must not become the starter's child, and leaves no zombie
    os.setsid()
    while os.getppid() == starter:  # nbdkit with an inherited socket ends with its parent: PR_SET_PDEATHSIG
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
    _limit(asked["threads"])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up the right to new privileges")
    if os.geteuid() == 0:
        libc.unshare(_CLONE_NEWNET)  # refused in some containers; then the filter alone denies the network
        os.setgroups([])
        os.setgid(asked["gid"])
        os.setuid(asked["uid"])
    os.chdir("/")
    if asked["filter"] is not None:
        _filter(libc, base64.b64decode(asked["filter"]))
    os.execve(asked["command"][0], asked["command"], environment)  # noqa: S606 -- no shell is wanted


def _limit(threads: int | None) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_DATA: _MOST_MEMORY,
        resource.RLIMIT_NOFILE: _MOST_FILES,
    }
    if threads is not None:
        limits[resource.RLIMIT_NPROC] = threads
    for name, most in limits.items():
        _, hard = resource.getrlimit(name)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(name, (most, most))


def _filter(libc: ctypes.CDLL, program: bytes) -> None:
    """Put this process, and the program after exec, under a seccomp filter for the rest of its life."""
    content = ctypes.create_string_buffer(program, len(program))
    described = _Program(len(program) // _INSTRUCTION_LENGTH, ctypes.addressof(content))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot put the process under a seccomp filter")


def _hand_over(asked: dict[str, int]) -> None:
    """Make the socket descriptor 3. Before any lock is taken: closing the previous 3 would release a lock."""
    for name in ("lock", "image", "ready"):
        if asked[name] == _FIRST_LISTENING:
            asked[name] = fcntl.fcntl(asked[name], fcntl.F_DUPFD, _FREE)
    os.dup2(asked["listening"], _FIRST_LISTENING)


def _lock_like_qemu(image: int) -> None:
    """Lock the image as QEMU does for writing, as long as the descriptor is open."""
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

"""Becomes a stage process: takes the locks, gives up root, and runs the program.

Run as a script, with the standard library alone. The arguments are

1. the descriptor to write to once the locks are taken, the starter waits for this;
2. the descriptor of the process's lock file; the POSIX lock outlives exec and ends with the process;
3. a JSON object, with

- ``image``: null, or the descriptor of an image to lock, for programs without QEMU's image locking.
- ``uid``, ``gid``: the user and group that run the program.
- ``listening``: null, or a listening socket: the program's descriptor 3 (sd_listen_fds(3)).
- ``gated``: null, or a listening socket at which the process gets connections from its gate only
  (:mod:`virt_sse.stages.gate`).
- ``environment``: environment variables to set.
- ``command``: the program, by absolute path, and the program's arguments.
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
"""QEMU ``block/file-posix.c``: locks for consistent reads, writes and resizes."""
_QEMU_UNSHARED = (201, 203)
"""Likewise: no other process may write or resize."""
_SYSTEM_CALLS = {
    "x86_64": (0xC000003E, 317, 43, 288),
    "aarch64": (0xC00000B7, 277, 202, 242),
}
"""Linux ``AUDIT_ARCH_…``, and the numbers of seccomp(2), accept(2) and accept4(2), by machine."""
_SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER = 1, 8
_SECCOMP_RET_ALLOW, _SECCOMP_RET_USER_NOTIF = 0x7FFF0000, 0x7FC00000
_BPF_LOAD, _BPF_JUMP_IF_EQUAL, _BPF_RETURN = 0x20, 0x15, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
"""Offsets in Linux ``struct seccomp_data``; the first argument's on a little-endian machine."""


def main() -> None:
    ready, lock, document = sys.argv[1:]
    asked = json.loads(document) | {"ready": int(ready), "lock": int(lock)}
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
    if asked["gated"] is not None:
        _gate(_FIRST_LISTENING if asked["gated"] == asked["listening"] else asked["gated"])
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


def _gate(listening: int) -> None:
    """Have the gate answer calls of accept4(2) and accept(2) on the socket (seccomp_unotify(2)).

    The process keeps the descriptor for the gate, so a new gate can replace one that was killed.
    """
    machine = os.uname().machine
    if machine not in _SYSTEM_CALLS:
        raise OSError(f"the gate of an NBD socket does not know the system calls of {machine}")
    architecture, seccomp, accept, accept4 = _SYSTEM_CALLS[machine]
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_BPF_LOAD, 0, 0, _ARCHITECTURE_AT),
            (_BPF_JUMP_IF_EQUAL, 0, 5, architecture),
            (_BPF_LOAD, 0, 0, _NUMBER_AT),
            (_BPF_JUMP_IF_EQUAL, 1, 0, accept4),
            (_BPF_JUMP_IF_EQUAL, 0, 2, accept),
            (_BPF_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
            (_BPF_JUMP_IF_EQUAL, 1, 0, listening),
            (_BPF_RETURN, 0, 0, _SECCOMP_RET_ALLOW),
            (_BPF_RETURN, 0, 0, _SECCOMP_RET_USER_NOTIF),
        )
    )
    instructions = ctypes.create_string_buffer(program, len(program))
    given = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)  # else seccomp(2) needs CAP_SYS_ADMIN
    notifier = libc.syscall(seccomp, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_NEW_LISTENER, given)
    if notifier < 0:
        problem = os.strerror(ctypes.get_errno())
        raise OSError(f"the kernel does not let a gate answer accept(2), seccomp_unotify(2): {problem}")
    os.set_inheritable(notifier, True)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error.strerror or error}")

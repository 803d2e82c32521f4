"""Becomes a stage process: takes the locks, gives up root and all rights not needed, and runs the program.

Run as a script, with the standard library alone. The arguments are

1. the descriptor to write to once the locks are taken, the starter waits for this;
2. the descriptor of the process's lock file; the POSIX lock outlives exec and ends with the process;
3. a JSON object, with

- ``image``: null, or the descriptor of an image to lock, for programs without QEMU's image locking.
- ``uid``, ``gid``: the user and group that run the program.
- ``listening``: null, or a listening socket: the program's descriptor 3 (sd_listen_fds(3)).
- ``threads``: null, or the maximum number of threads of the user.
- ``network``: whether the program keeps the host's network.
- ``filter``: null, or a seccomp filter, a BPF program in hexadecimal.
- ``readable``, ``writable``: paths of the files and folders that the program may read, or change, beside
  system files; see :func:`landlock`.
- ``gated``: null, or a listening socket at which the process gets connections from its gate only
  (:mod:`virt_sse.stages.gate`).
- ``gate``: null, or the gate to start as well, by a fork: a domain's start would wait for a second
  interpreter. An object with the descriptors ``lock``, ``listening`` and ``log``, and the paths
  ``stage_socket`` and ``qemu_pid_file``. The program starts once the gate works.
- ``environment``: environment variables to set.
- ``command``: the program, by absolute path, and the program's arguments.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import resource
import stat
import struct
import sys
import time

_FIRST_LISTENING, _FREE = 3, 64
_PR_GET_SECCOMP, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 21, 22, 38
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

_INSTRUCTION_LENGTH = 8
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_VERSION, _LANDLOCK_RULE_PATH_BENEATH = 1, 1
_EXECUTE, _WRITE, _READ, _READ_FOLDER, _REMOVE, _MAKE, _TRUNCATE = (
    1 << bit for bit in (0, 1, 2, 3, 5, 8, 14)
)
_OF_VERSION_1 = (1 << 13) - 1
"""All rights of the first version of Landlock: to read, execute, write, make and remove."""
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE
_READABLE = """
/usr /lib /lib32 /lib64 /nix/store /gnu/store /proc /sys/devices/system /dev/null /dev/urandom
/etc/ld.so.cache /etc/ld.so.preload /etc/ssl/openssl.cnf /etc/gnutls /etc/crypto-policies /etc/localtime
"""
"""What programs and their libraries read by themselves."""


class _Program(ctypes.Structure):
    """``struct sock_fprog``: the number of instructions, and their address."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


class _Ruleset(ctypes.Structure):
    """``struct landlock_ruleset_attr``; versions before 4 and 6 lack the later fields."""

    _fields_ = tuple((name, ctypes.c_uint64) for name in ("files", "network", "scoped"))


class _PathBeneath(ctypes.Structure):
    """``struct landlock_path_beneath_attr``."""

    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32))


def main() -> None:
    ready, lock, document = sys.argv[1:]
    asked = json.loads(document) | {"ready": int(ready), "lock": int(lock)}
    starter = os.getpid()
    gate = asked["gate"]
    if gate:
        stage_ready, asked["stage_ready"] = os.pipe()
        asked["gate_ready"], gate_ready = os.pipe()
    if stage := os.fork():
        if gate and not os.fork():
            _become_gate(stage, stage_ready, ready=gate_ready, **gate)
        os._exit(0)  # the program must not become the starter's child, and leaves no zombie
    if gate:
        for descriptor in (stage_ready, gate_ready, gate["lock"], gate["listening"], gate["log"]):
            os.close(descriptor)  # only the gate may accept clients
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
    if gate:
        os.write(asked["stage_ready"], b"1")
        os.close(asked["stage_ready"])
        if not os.read(asked["gate_ready"], 1):
            raise OSError("the gate of the NBD socket has ended")
        os.close(asked["gate_ready"])
    os.write(asked["ready"], b"1")
    os.close(asked["ready"])
    os.umask(0o077)
    _limit(asked["threads"])
    libc = ctypes.CDLL(None, use_errno=True)
    ruleset = landlock(libc, asked["readable"], asked["writable"])
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot give up the right to new privileges")
    if os.geteuid() == 0:
        if not asked["network"]:
            libc.unshare(
                _CLONE_NEWNET
            )  # refused in some containers; then the filter alone denies the network
        os.setgroups([])
        os.setgid(asked["gid"])
        os.setuid(asked["uid"])
    os.chdir("/")
    if ruleset is not None and libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot restrict the process by Landlock")
    if asked["filter"] is not None:
        put_under_filter(libc, bytes.fromhex(asked["filter"]))
    os.execve(asked["command"][0], asked["command"], environment)  # noqa: S606 -- no shell is wanted


def _become_gate(
    stage: int,
    stage_ready: int,
    *,
    ready: int,
    lock: int,
    listening: int,
    log: int,
    stage_socket: str,
    qemu_pid_file: str,
) -> None:
    """Serve as the gate of the process *stage*, once the process has written to *stage_ready*; then exit."""
    for standard in (1, 2):
        os.dup2(log, standard)
    kept = {0, 1, 2, stage_ready, ready, lock, listening}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 -- pathlib loads slowly
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:  # the descriptor of this very list
                continue
    sys.path.append(os.path.dirname(__file__))  # noqa: PTH120 -- likewise
    gate = __import__("gate")
    if not os.read(stage_ready, 1):
        sys.exit(1)  # the stage process has reported why it ended
    os.close(stage_ready)
    try:
        gate.serve(ready, lock, listening, stage, stage_socket=stage_socket, qemu_pid_file=qemu_pid_file)
    except OSError as error:
        sys.exit(f"{error.strerror or error}")
    sys.exit()


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


def landlock_version(libc: ctypes.CDLL) -> int:
    """The version of Landlock in the kernel; below 1 if there is none, or a seccomp filter denies its use."""
    if libc.prctl(_PR_GET_SECCOMP, 0, 0, 0, 0) == _SECCOMP_MODE_FILTER and not _survives_landlock(libc):
        return -1
    version: int = libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
    return version


def _survives_landlock(libc: ctypes.CDLL) -> bool:
    """Whether a seccomp filter around this process ends no process that asks for Landlock."""
    child = os.fork()
    if not child:
        libc.syscall(_LANDLOCK_CREATE_RULESET, None, 0, _LANDLOCK_VERSION)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return status == 0


def landlock(libc: ctypes.CDLL, readable: list[str], writable: list[str]) -> int | None:
    """A Landlock ruleset (landlock(7)): *readable*, system libraries, *writable*, and no other file.

    Landlock also denies ptrace(2) and signals to all other processes, even to processes of the same user.

    :return: the descriptor; ``None`` if the kernel has no Landlock.
    """
    version = landlock_version(libc)
    if version < 1:
        return None
    handled = _OF_VERSION_1 | (_TRUNCATE if version >= 3 else 0)
    asked = _Ruleset(handled, 0, 0b11)  # abstract sockets and signals
    length = 8 if version < 4 else 16 if version < 6 else 24
    ruleset: int = libc.syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(asked), length, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "cannot make a Landlock ruleset")
    for paths, rights in (
        ([*readable, *_READABLE.split()], _READ | _READ_FOLDER | _EXECUTE),
        ([*writable, os.devnull], _READ | _WRITE | _TRUNCATE | _READ_FOLDER | _MAKE | _REMOVE),
    ):
        for path in paths:
            _allow(libc, ruleset, path, rights & handled)
    return ruleset


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    """Allow *rights* on a file, or on all files below a folder; missing paths are left out."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    if not stat.S_ISDIR(os.fstat(place).st_mode):
        rights &= _OF_FILES
    rule = _PathBeneath(rights, place)
    if libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_RULE_PATH_BENEATH, ctypes.byref(rule), 0) != 0:
        raise OSError(ctypes.get_errno(), f"cannot allow {path} by Landlock")
    os.close(place)


def put_under_filter(libc: ctypes.CDLL, program: bytes) -> None:
    """Put this process, and the program after exec, under a seccomp filter for the rest of its life."""
    content = ctypes.create_string_buffer(program, len(program))
    described = _Program(len(program) // _INSTRUCTION_LENGTH, ctypes.addressof(content))
    if libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(described), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot put the process under a seccomp filter")


def _hand_over(asked: dict[str, int]) -> None:
    """Make the socket descriptor 3. Before any lock is taken: closing the previous 3 would release a lock."""
    for name in ("lock", "image", "ready", "stage_ready", "gate_ready"):
        if asked.get(name) == _FIRST_LISTENING:
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

"""Gate of a disk's NBD socket: hands the domain's own QEMU to the stage process, and no other client.

Forked by :mod:`~virt_sse.stages.launch`, or run as a script; as root, with the standard library alone. QEMU
processes of all domains may run as one user, so the mode of a socket does not separate them. Therefore only
the gate listens at the path named in the domain. The stage process listens at a path that only root can
reach; its accept4(2) calls on that socket are answered by the gate (seccomp_unotify(2)), which adds the
accepted connection to the stage process.

The domain's QEMU is the process with the lock on libvirt's pid file: libvirt takes the lock for the process
before it executes QEMU, and the kernel releases the lock when the process ends.

Without its gate, a stage process goes on with its connections and gets no new ones. A new gate can take over.

The arguments of the script are

1. the descriptor to write to once the gate works;
2. the descriptor of the gate's lock file;
3. the descriptor of the socket at the path named in the domain;
4. the process id of the stage process;
5. the path of the socket at which the stage process listens;
6. the path of libvirt's pid file.

Each refused process is named once on the standard error. json, contextlib and pathlib are not imported: a
domain's start waits for the gate.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import socket
import struct
import sys
import time

_NOTIFICATION = struct.Struct("=QII iIQ6Q")
"""Linux ``struct seccomp_notif``: id, pid, flags, then system call, architecture, place, arguments."""
_RESPONSE = struct.Struct("=QqiI")
"""Linux ``struct seccomp_notif_resp``: id, result, error, flags."""
_ADDITION = struct.Struct("=QIIII")
"""Linux ``struct seccomp_notif_addfd``: id, flags, our descriptor, the new descriptor and its flags."""
_RECEIVE, _RESPOND, _ADD = 0xC0502100, 0xC0182101, 0x40182103
"""Linux ``SECCOMP_IOCTL_NOTIF_RECV``, ``…_SEND``, ``…_ADDFD``."""
_CONTINUE = 1
"""Linux ``SECCOMP_USER_NOTIF_FLAG_CONTINUE``: the stage process executes its system call itself."""
_ADD_AND_RESPOND = 2
"""Linux ``SECCOMP_ADDFD_FLAG_SEND``, 5.14 or newer: the new descriptor is the system call's result."""
_PIDFD_GETFD = 438
"""The number of the system call, the same on all architectures."""
_NOTIFIER = "anon_inode:seccomp notify"
_CREDENTIALS = struct.Struct("3i")
_FLOCK = struct.Struct("hhqqi4x")
_PAUSE_SECONDS = 0.001
"""Time between a refused client and the next: a flood of clients takes little processor time."""
_MOST_REPORTS = 100


def main() -> None:
    ready, lock, listening, pid = map(int, sys.argv[1:5])
    stage_socket, qemu_pid_file = sys.argv[5:]
    if os.fork():
        os._exit(0)
    serve(ready, lock, listening, pid, stage_socket=stage_socket, qemu_pid_file=qemu_pid_file)


def serve(ready: int, lock: int, listening: int, pid: int, *, stage_socket: str, qemu_pid_file: str) -> None:
    """Be the gate until the stage process ends. The parameters are the arguments of the script.

    :raise OSError: When the gate cannot work.
    """
    os.setsid()
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    _avoid_the_oom_killer()
    stage = os.pidfd_open(pid)
    gate = Gate(
        socket.socket(fileno=listening),
        stage=stage,
        notifier=_descriptor_of(stage, _notifier_of(pid)),
        stage_socket=stage_socket,
        qemu_pid_file=qemu_pid_file,
    )
    os.write(ready, b"1")
    os.close(ready)
    gate.serve()


def _avoid_the_oom_killer() -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123 -- pathlib loads slowly
            file.write("-1000")
    except OSError:  # a container may forbid
        pass


class Gate:
    """Admits connections of one process to a stage process, until the stage process ends."""

    def __init__(
        self, listening: socket.socket, *, stage: int, notifier: int, stage_socket: str, qemu_pid_file: str
    ) -> None:
        self._listening = listening
        self._stage = stage
        self._notifier = notifier
        self._stage_socket = stage_socket
        self._qemu_pid_file = qemu_pid_file
        self._admitted: socket.socket | None = None
        self._announcement: socket.socket | None = None
        self._reported: set[int] = set()

    def serve(self) -> None:
        while True:
            waiting = select.poll()
            waiting.register(self._stage, select.POLLIN)
            waiting.register(self._notifier, select.POLLIN)
            if self._admitted is None:
                waiting.register(self._listening, select.POLLIN)
            ready = [descriptor for descriptor, _ in waiting.poll()]
            if self._stage in ready:
                return
            try:
                if self._notifier in ready:
                    self._answer()
                else:
                    self._admit()
            except OSError:  # the stage process or the client has just ended
                continue

    def _admit(self) -> None:
        """Take the next client; announce the domain's QEMU to the stage process, disconnect all others."""
        client, _ = self._listening.accept()
        pid, uid, _ = _peer(client)
        if pid <= 0 or pid != lock_holder(self._qemu_pid_file):
            client.close()
            self._report(pid, uid)
            time.sleep(_PAUSE_SECONDS)
            return
        announcement = socket.socket(socket.AF_UNIX)
        announcement.setblocking(False)
        announcement.connect(self._stage_socket)
        self._admitted, self._announcement = client, announcement

    def _answer(self) -> None:
        """Answer an accept4(2) of the stage process with the admitted client, if any."""
        notification = bytearray(_NOTIFICATION.size)
        fcntl.ioctl(self._notifier, _RECEIVE, notification)
        call, *_, descriptor, _, _, _, _, _ = _NOTIFICATION.unpack(notification)
        if self._admitted is None:  # a client that is root
            fcntl.ioctl(self._notifier, _RESPOND, _RESPONSE.pack(call, 0, 0, _CONTINUE))
            return
        try:
            with socket.socket(fileno=_descriptor_of(self._stage, descriptor)) as stage_socket:
                client, _ = stage_socket.accept()
            with client:
                if _peer(client)[0] == os.getpid():
                    with self._admitted as admitted:
                        self._admitted = self._announcement = None
                        self._add(call, admitted)
                else:  # a client that is root, before the announcement
                    self._add(call, client)
        except OSError:
            self._admitted = self._announcement = None
            fcntl.ioctl(self._notifier, _RESPOND, _RESPONSE.pack(call, 0, -errno.ECONNABORTED, 0))
            raise

    def _add(self, call: int, client: socket.socket) -> None:
        """Add *client* to the stage process, as the result of its system call."""
        addition = _ADDITION.pack(call, _ADD_AND_RESPOND, client.fileno(), 0, os.O_CLOEXEC)
        fcntl.ioctl(self._notifier, _ADD, addition)

    def _report(self, pid: int, uid: int) -> None:
        if pid in self._reported or len(self._reported) >= _MOST_REPORTS:
            return
        self._reported.add(pid)
        try:
            program = os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115 -- pathlib loads slowly
        except OSError:
            program = "an ended program"
        os.write(2, f"process {pid} of user {uid}, {program!r}\n".encode(errors="replace"))


def lock_holder(path: str) -> int | None:
    """The process that has locked root's file at *path* for writing, if any.

    A lock for reading is ignored: every user who may read the file can take one.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        if os.fstat(file).st_uid != 0:
            return None
        asked = _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_GETLK, asked))
    finally:
        os.close(file)
    return None if kind == fcntl.F_UNLCK else pid


def _peer(client: socket.socket) -> tuple[int, int, int]:
    """Process, user and group of *client* when it connected."""
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(credentials)
    return pid, uid, gid


def _notifier_of(pid: int) -> int:
    """The number of the process's descriptor for notifications of its system calls."""
    for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 -- pathlib loads slowly
        try:
            place = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115 -- likewise
        except FileNotFoundError:  # closed since
            continue
        if place == _NOTIFIER:
            return int(name)
    raise OSError(f"process {pid} has no descriptor for notifications")


def _descriptor_of(process: int, number: int) -> int:
    """A copy of a descriptor of a different process, by pidfd_getfd(2)."""
    copy: int = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, number, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), "cannot copy a descriptor of the stage process")
    return copy


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"{error.strerror or error}")

"""The seccomp filter of stage processes (seccomp(2)), compiled by libseccomp.

The filter denies system calls that a process on the data path never needs, as QEMU's ``-sandbox
on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny`` does; denied calls fail with EPERM.
``execve`` is allowed: the program is executed under the filter.

libseccomp is called directly, because importing the PyPI package pyseccomp runs ldconfig, for 20 ms.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import socket

from virt_sse.errors import ToolError

_LIBRARY = "libseccomp.so.2"
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NOT_EQUAL, _EQUAL, _GREATER, _MASKED_EQUAL = 1, 4, 6, 7
_CLONE_THREAD = 0x10000
_UNKNOWN = -1
"""``__NR_SCMP_ERROR``: this libseccomp does not know a call, e.g. a newer one."""

_DENIED = """
fork vfork execveat
setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset
chown fchown lchown fchownat mknod mknodat
unshare setns chroot pivot_root
mount umount2 move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr swapon swapoff
quotactl quotactl_fd
ptrace process_vm_readv process_vm_writev process_madvise pidfd_open pidfd_getfd kcmp
bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register
keyctl add_key request_key
init_module finit_module delete_module kexec_load kexec_file_load reboot
open_by_handle_at name_to_handle_at fanotify_init
setpriority sched_setparam sched_setscheduler sched_setaffinity sched_setattr ioprio_set
migrate_pages move_pages mbind set_mempolicy
settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname
acct syslog vhangup iopl ioperm modify_ldt personality uselib ustat sysfs nfsservctl lookup_dcookie
"""


class _Comparison(ctypes.Structure):
    """``struct scmp_arg_cmp``."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


@functools.cache
def stage_filter(*, has_network: bool = False) -> bytes:
    """The filter as a BPF program for ``PR_SET_SECCOMP``.

    :param has_network: allow IP, for a process whose image is in Ceph.
    :raise ToolError: When libseccomp is not installed, or does not compile the filter.
    """
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as exc:
        raise ToolError(f"{_LIBRARY} is not installed") from exc
    library.seccomp_init.restype = context_type = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [context_type]
    library.seccomp_export_bpf.argtypes = [context_type, ctypes.c_int]
    library.seccomp_rule_add_array.argtypes = [
        *(context_type, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_Comparison),
    ]
    context = library.seccomp_init(_ALLOW)

    def deny(name: str, *comparisons: _Comparison, error: int = errno.EPERM) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _UNKNOWN:
            return
        given = (_Comparison * len(comparisons))(*comparisons)
        if status := library.seccomp_rule_add_array(context, _ERRNO | error, number, len(comparisons), given):
            raise ToolError(f"{_LIBRARY} cannot deny {name}: {os.strerror(-status)}")

    try:
        for name in _DENIED.split():
            deny(name)
        flags = 1 if os.uname().machine == "s390x" else 0
        deny("clone", _Comparison(flags, _MASKED_EQUAL, _CLONE_THREAD, 0))
        deny("clone3", error=errno.ENOSYS)  # has its flags in memory; the C library falls back to clone
        if has_network:
            deny("socket", _Comparison(0, _GREATER, socket.AF_INET6, 0))
            for family in set(range(socket.AF_INET6)) - {socket.AF_UNIX, socket.AF_INET}:
                deny("socket", _Comparison(0, _EQUAL, family, 0))
        else:
            deny("socket", _Comparison(0, _NOT_EQUAL, socket.AF_UNIX, 0))
        with os.fdopen(os.memfd_create("filter"), "rb") as file:
            if status := library.seccomp_export_bpf(context, file.fileno()):
                raise ToolError(f"{_LIBRARY} cannot compile the filter: {os.strerror(-status)}")
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def is_available() -> bool:
    """Whether stage processes run under the filter."""
    try:
        stage_filter()
    except ToolError:
        return False
    return True

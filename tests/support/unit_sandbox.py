"""Runs a command under the restrictions of a systemd unit, where no systemd runs.

Run as a script and as root: ``unit_sandbox.py UNIT COMMAND…``. Applies ``ProtectSystem=full``,
``ProtectKernelTunables``, ``CapabilityBoundingSet``, ``NoNewPrivileges``, ``SystemCallFilter``,
``RestrictAddressFamilies`` and ``RestrictNamespaces`` as systemd.exec(5) describes them. systemd-analyze(1)
lists the groups of system calls; libseccomp compiles the filter.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000
_EQUAL, _MASKED_EQUAL = 4, 7
_PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 24, 38
_CLONE_NEWNS = 0x20000
_NAMESPACES = {
    "cgroup": 0x02000000,
    "ipc": 0x08000000,
    "mnt": _CLONE_NEWNS,
    "net": 0x40000000,
    "pid": 0x20000000,
    "user": 0x10000000,
    "uts": 0x04000000,
}
_CAPABILITIES = """
CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE
"""
"""In the order of their numbers (capabilities(7))."""


class _Comparison(ctypes.Structure):
    """``struct scmp_arg_cmp``."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
    )


def settings(unit: str) -> dict[str, list[str]]:
    """The words of each setting of a unit; several lines of a setting add up."""
    found: dict[str, list[str]] = {}
    for line in unit.splitlines():
        name, equals, value = line.partition("=")
        if equals and name.isalnum():
            found.setdefault(name, []).extend(value.split())
    return found


def system_calls(names: Iterable[str]) -> set[str]:
    """The system calls in *names*, which may be groups like ``@mount``."""
    groups: dict[str, list[str]] = {}
    listed = subprocess.run(
        ["systemd-analyze", "syscall-filter"], capture_output=True, text=True, check=True
    ).stdout
    group = ""
    for line in listed.splitlines():
        word = line.strip()
        if line.startswith("@"):
            group = word
        elif line.startswith(" ") and not word.startswith("#"):
            groups.setdefault(group, []).append(word)

    def expanded(name: str) -> Iterator[str]:
        if not name.startswith("@"):
            yield name
        for each in groups.get(name, ()):
            yield from expanded(each)

    return {call for name in names for call in expanded(name)}


def main() -> None:
    unit, *command = sys.argv[1:]
    found = settings(Path(unit).read_text("utf-8"))
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS))
    for arguments in (
        ["--make-rslave", "/"],
        *(way for path in ("/usr", "/etc", "/proc/sys") for way in _read_only(path)),
    ):
        subprocess.run(["mount", *arguments], check=True)
    calls = system_calls(found["SystemCallFilter"])
    kept = {name.removeprefix("CAP_") for name in found["CapabilityBoundingSet"]}
    for number, name in enumerate(_CAPABILITIES.split()):
        if name not in kept:
            _check(libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0))
    _check(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _filter(calls, found["RestrictAddressFamilies"], found["RestrictNamespaces"])
    os.execvp(command[0], command)  # noqa: S606 -- no shell is wanted


def _read_only(path: str) -> list[list[str]]:
    return [["--bind", path, path], ["-o", "remount,bind,ro", path]]


def _check(status: int) -> None:
    if status < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _filter(calls: set[str], families: list[str], namespaces: list[str]) -> None:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = context_type = ctypes.c_void_p
    library.seccomp_load.argtypes = [context_type]
    library.seccomp_rule_add_array.argtypes = [
        *(context_type, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint),
        ctypes.POINTER(_Comparison),
    ]
    context = library.seccomp_init(_ERRNO | errno.EPERM)

    def rule(action: int, name: str, *comparisons: _Comparison) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1:  # systemd leaves such names out, too
            return
        given = (_Comparison * len(comparisons))(*comparisons)
        status = library.seccomp_rule_add_array(context, action, number, len(comparisons), given)
        if status < 0:
            raise OSError(-status, f"{name}: {os.strerror(-status)}")

    refused = sum(bit for name, bit in _NAMESPACES.items() if name not in namespaces)
    for name in sorted(calls - {"clone3"}):
        if name == "socket":
            for family in families:
                rule(_ALLOW, name, _Comparison(0, _EQUAL, getattr(socket, family), 0))
        elif name in ("clone", "unshare"):
            rule(_ALLOW, name, _Comparison(0, _MASKED_EQUAL, refused, 0))
        elif name == "setns":
            rule(_ALLOW, name, _Comparison(1, _MASKED_EQUAL, refused, 0))
        else:
            rule(_ALLOW, name)
    rule(_ERRNO | errno.ENOSYS, "clone3")
    status = library.seccomp_load(context)
    if status < 0:
        raise OSError(-status, os.strerror(-status))


if __name__ == "__main__":
    main()

"""A domain's QEMU as libvirt starts it: a process with the lock on libvirt's pid file."""

from __future__ import annotations

import sys
from pathlib import Path

_SCRIPT = (
    "import fcntl, os, sys\n"
    "os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)\n"
    "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o644)\n"
    "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
    "os.truncate(file, os.write(file, b'%d' % os.getpid()))\n"
    "os.set_inheritable(file, True)\n"
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


def as_qemu(pid_file: Path) -> list[str]:
    """What runs a command as libvirt runs QEMU (libvirt ``virPidFileAcquirePath``)."""
    return [sys.executable, "-I", "-S", "-c", _SCRIPT, str(pid_file)]

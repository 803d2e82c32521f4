"""Protection of a process's memory: no core files, no ptrace by the same user."""

from __future__ import annotations

import ctypes
import os
import resource

from virt_sse.errors import VirtSseError

_PR_SET_DUMPABLE = 4


def protect_memory() -> None:
    """Keep this process's memory out of core files, and from other processes of the same user.

    Each entry point calls this function before the process reads a key. The call takes about 1 ms.

    - ``RLIMIT_CORE`` 0 (getrlimit(2)) passes to every subprocess: qemu-img and cryptsetup read
      passphrases, too.
    - ``PR_SET_DUMPABLE`` 0 (prctl(2)) also forbids cores that the kernel pipes to a program, where the kernel
      ignores ``RLIMIT_CORE`` 0 (core(5)), and forbids ptrace by processes without ``CAP_SYS_PTRACE``. exec
      resets the attribute.

    For a process of an ordinary user, files of root appear in ``/proc/self`` from now on. The process and its
    children still open their own descriptors by ``/proc/self/fd/N``: the kernel never checks a thread group's
    access to itself. An ordinary user's child loses access to its parent's ``/proc/PID/fd``, which virt-sse
    does not use.

    :raise VirtSseError: When the kernel refuses, for instance by a seccomp filter.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as exc:
        raise VirtSseError(f"cannot protect this process's memory: {exc.strerror}") from exc

"""Child processes that end with the thread that started them, whichever process is killed, at any moment.

.. code-block:: text

    thread ── setpriv, with namespace: unshare ── sh, the gate; becomes the command ── …

The kernel kills a process at the end of its parent if the process has asked for the signal (PR_SET_PDEATHSIG
in prctl(2)); a request after the parent's end has no effect. Therefore the command begins only once all
requests are made and all parents still run: the gate reports, and waits for an answer. Without the thread's
process, the gate reads end of file instead, and exits.

With a namespace, the command is the first process of a PID namespace. Once the first process has ended, the
kernel ends all processes of the namespace (pid_namespaces(7)), whatever call they are blocked in.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from virt_sse.errors import ToolError

_SIGNALLED = ("setpriv", "--pdeathsig", "KILL", "--")
_GATE = 'echo >"$1" && read -r _ <"$2" && shift 2 && exec "$@"'


def namespace() -> list[str]:
    """The beginning of a command that makes a PID namespace; an ordinary user needs a user namespace, too.

    bwrap reads its child's folder in /proc: /proc must be the namespace's.
    """
    user = [] if os.geteuid() == 0 else ["--user", "--map-current-user"]
    return ["unshare", *user, "--pid", "--fork", "--kill-child", "--mount-proc", "--"]


@contextlib.contextmanager
def leashed(
    command: Sequence[str],
    *,
    in_namespace: bool,
    stdin: int,
    stdout: int,
    stderr: int | BinaryIO,
    pass_fds: Sequence[int],
    environment: Mapping[str, str],
) -> Iterator[subprocess.Popen[bytes]]:
    """Run *command* during the block; at the end of the block, kill the command and wait for its end.

    The exit status is the command's, or 127 when the command is not found.

    :param in_namespace: put the command, and all its children, into a PID namespace.
    :raise ToolError: When setpriv(1) is not installed.
    """
    reading, report = os.pipe2(os.O_CLOEXEC)
    waiting, answer = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reading, "rb") as reports, os.fdopen(answer, "wb", buffering=0) as answers:
        gate = ["sh", "-c", _GATE, "sh", f"/proc/self/fd/{report}", f"/proc/self/fd/{waiting}"]
        try:
            process = subprocess.Popen(
                [*_SIGNALLED, *(namespace() if in_namespace else []), *gate, *command],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[*pass_fds, report, waiting],
                env=environment,
            )
        except FileNotFoundError as exc:
            raise ToolError(f"{_SIGNALLED[0]} is not installed") from exc
        finally:
            os.close(report)
            os.close(waiting)
        with process:
            first = None
            try:
                if reports.readline():  # otherwise standard error contains the reason
                    first = _first_process(process.pid, in_namespace=in_namespace)
                    if process.poll() is None:
                        with contextlib.suppress(BrokenPipeError):
                            answers.write(b"\n")
                yield process
            finally:
                if first is None:
                    process.kill()
                else:
                    _end(first)
                process.wait()


def _first_process(pid: int, *, in_namespace: bool) -> int | None:
    """A pidfd of the gate; ``None`` if the gate has ended, or if the kernel has no lists of children."""
    try:
        if in_namespace:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii"))
        return os.pidfd_open(pid)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return None


def _end(first: int) -> None:
    """Kill a process, and wait until the process, and all processes of its namespace, have ended."""
    with os.fdopen(first, "rb", buffering=0), contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(first, signal.SIGKILL)
        ended = select.poll()
        ended.register(first, select.POLLIN)
        ended.poll()

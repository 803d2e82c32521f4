"""``virt-sse`` on a leash: a process of a lab's vault or agent, ended together with its owner.

Arguments: the number of the owner's pidfd, followed by the arguments of ``virt-sse``. The pidfd becomes
readable at the owner's end; a parent-death signal would already fire at the end of the starting thread. On
SIGUSR1, the process prints the stack of each thread on its standard error.
"""

from __future__ import annotations

import faulthandler
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def start(
    arguments: Sequence[str],
    log_path: Path,
    *,
    output: int | None = None,
    command: Callable[[list[str]], list[str]] = list,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start ``virt-sse`` with *arguments*, to be ended together with this process.

    :param log_path: file to append standard error to, and standard output if *output* is ``None``.
    :param output: destination of standard output, as for :class:`subprocess.Popen`.
    :param command: wraps the argument vector, e.g. to enter a namespace.
    """
    owner = os.pidfd_open(os.getpid())
    try:
        with log_path.open("a") as log:
            return subprocess.Popen(
                command([sys.executable, "-m", __name__, str(owner), *arguments]),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log if output is None else output,
                stderr=log,
                text=True,
                pass_fds=(owner,),
                start_new_session=True,  # Ctrl-C in the terminal must reach only the owner
            )
    finally:
        os.close(owner)


def end_with(owner: int) -> None:
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from virt_sse.cli.main import main

    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv[:2] = ["virt-sse"]
    main()

"""``virt-sse`` on a leash: a lab's vault or agent, ended together with its owner.

Arguments: the number of a pidfd of the owner, which becomes readable when that ends, then those of
``virt-sse``. A parent-death signal would come when merely the starting thread ends. SIGUSR1 has it say on its
standard error what each thread is doing.
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
    """Start ``virt-sse`` with *arguments*, on the leash of this process.

    :param log_path: what it says on its standard error is added there; on its standard output too, unless
    :param output: says where that goes, as for :class:`subprocess.Popen`.
    :param command: makes of the command the one that runs it.
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
                start_new_session=True,  # Ctrl-C in the terminal is for the owner alone
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

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
import sys
import threading

from virt_sse.cli.main import main


def end_with(owner: int) -> None:
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    sys.argv[:2] = ["virt-sse"]
    main()

"""What data passes between a guest's QEMU and the storage: one process per disk and stage.

Per disk, so that one that dies, or is attacked through the guest's data, holds the DEK of one disk, and a
disk can be plugged in and out of a running guest with all that is its own. They are not children of the
command that starts them, and are known by a lock that each of them holds (:mod:`~virt_sse.stages.process`).
"""

from __future__ import annotations

from virt_sse.stages.running import Stages

__all__ = ["Stages"]

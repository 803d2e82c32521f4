"""Processes on the data path between a guest's QEMU and the storage: a process per disk and kind of stage.

Each process holds at most the DEK of one disk, so a crash or an attack through guest data affects one disk
only, and a disk can be plugged into and out of a running guest together with its processes. The processes are
not children of the starting command; a process is identified by a lock
(:mod:`~virt_sse.stages.locked_process`). :mod:`~virt_sse.stages.kinds` lists the kinds of stage processes.
"""

from __future__ import annotations

from virt_sse.stages.stages import Stages

__all__ = ["Stages"]

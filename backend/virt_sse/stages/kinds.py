"""The kinds of stage processes. A new kind needs a module and an entry."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from virt_sse.errors import StageError
from virt_sse.model.layers import GuestNode, LayerPlan, Stage, StorageNode
from virt_sse.stages.host_cache import HostCacheProcess
from virt_sse.stages.stage_process import StageProcess
from virt_sse.stages.storage_daemon import StorageDaemonProcess

StageKinds = tuple[type[StageProcess[Any]], ...]
"""Guest first, as a rule; the plan of a disk sets the order.

``Any``: a kind's methods take the kind's own stage, which its ``stage_type`` names.
"""

STAGE_KINDS: StageKinds = (StorageDaemonProcess, HostCacheProcess)


def kind_of(stage: Stage, kinds: StageKinds = STAGE_KINDS) -> type[StageProcess[Any]]:
    """The kind of process for *stage*.

    :raise StageError: When no kind serves such a stage.
    """
    for kind in kinds:
        if isinstance(stage, kind.stage_type):
            return kind
    raise StageError(f"no kind of process serves the stage {type(stage).__name__}")


def by_process(
    stages: Sequence[Stage], kinds: StageKinds = STAGE_KINDS
) -> list[tuple[type[StageProcess[Any]], tuple[Stage, ...]]]:
    """The processes for *stages*, guest first, each with the adjacent stages that the process serves.

    :raise StageError: As for :func:`kind_of`.
    """
    grouped = itertools.groupby(stages, lambda stage: kind_of(stage, kinds))
    return [(kind, tuple(adjacent)) for kind, adjacent in grouped]


def guest_and_below(
    plan: LayerPlan, kinds: StageKinds = STAGE_KINDS
) -> tuple[GuestNode | None, tuple[Stage, ...]]:
    """The node in the guest's QEMU, if any, and the stages below, guest first.

    :raise StageError: When the first stage of *plan* does not encrypt, or the stages below the guest's QEMU
        are of unknown kinds, or need two processes of one kind, or a process would have to serve several
        stages and cannot.
    """
    guest = plan.stages[0] if plan.stages and isinstance(plan.stages[0], GuestNode) else None
    below = plan.stages[1:] if guest else plan.stages
    processes = by_process(below, kinds)
    encrypts = guest or (below and isinstance(below[0], StorageNode))
    is_served = all(kind.serves_several or len(stages) == 1 for kind, stages in processes)
    if not encrypts or len({kind for kind, _ in processes}) < len(processes) or not is_served:
        names = ", ".join(type(stage).__name__ for stage in plan.stages)
        raise StageError(f"the plan's stages are out of order: {names}")
    return guest, below

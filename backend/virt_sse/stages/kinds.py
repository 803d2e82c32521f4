"""The kinds of stage processes, in the order of the data path. A new kind needs a module and an entry."""

from __future__ import annotations

from typing import Any

from virt_sse.errors import StageError
from virt_sse.model.layers import GuestNode, LayerPlan, Stage
from virt_sse.stages.host_cache import HostCacheProcess
from virt_sse.stages.stage_process import StageProcess
from virt_sse.stages.storage_daemon import StorageDaemonProcess

StageKinds = tuple[type[StageProcess[Any]], ...]
"""Guest first. ``Any``: a kind's methods take the kind's own stage, which its ``stage_type`` names."""

STAGE_KINDS: StageKinds = (HostCacheProcess, StorageDaemonProcess)


def kind_of(stage: Stage, kinds: StageKinds = STAGE_KINDS) -> type[StageProcess[Any]]:
    """The kind of process for *stage*.

    :raise StageError: When no kind serves such a stage.
    """
    for kind in kinds:
        if isinstance(stage, kind.stage_type):
            return kind
    raise StageError(f"no kind of process serves the stage {type(stage).__name__}")


def guest_and_below(plan: LayerPlan, kinds: StageKinds = STAGE_KINDS) -> tuple[GuestNode, tuple[Stage, ...]]:
    """The node in the guest's QEMU, and the stages below, guest first.

    :raise StageError: When *plan* does not begin with a guest node, or its other stages are of unknown kinds,
        out of order, or not of different kinds.
    """
    guest, *below = plan.stages
    places = [kinds.index(kind_of(stage, kinds)) for stage in below]
    if not isinstance(guest, GuestNode) or sorted(set(places)) != places:
        names = ", ".join(type(stage).__name__ for stage in plan.stages)
        raise StageError(f"the plan's stages are out of order: {names}")
    return guest, tuple(below)

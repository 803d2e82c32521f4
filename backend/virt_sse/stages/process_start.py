"""The launch of a single stage process, tried again once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from virt_sse.errors import MonitorSilentError, StageError, VirtSseError
from virt_sse.model.keys import Dek
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.stages import sockets
from virt_sse.stages.gate_process import GateProcess
from virt_sse.stages.hand_over import VIEWING
from virt_sse.stages.hand_over_process import HandOverProcess
from virt_sse.stages.stage_process import StageProcess

_DENIED_HINT = (
    "each storage process has a user id of its own: all users must be able to pass the image's folders "
    "(chmod o+x); or set 'storage-user' in [host]"
)


def start_process(
    stage: StageProcess[Any],
    path: Path,
    deks: Sequence[Dek],
    image: int | None,
    gate: GateProcess | None,
    base: BaseImage | None,
    hand_over: HandOverProcess | None,
) -> None:
    """Start a process; return once the process serves the disk.

    :param path: of the disk's image, for messages.
    :param deks: of the process's slots.
    :param image: descriptor of the image, if the image has to be locked on the program's behalf.
    :param gate: the gate before the process.
    :param base: the image below a linked clone.
    :param hand_over: serves the disk by the process, while the guest still runs on another host.
    :raise StageError: When the process does not start.
    """
    stage.prepare()
    for is_last in (False, True):
        with contextlib.ExitStack() as open_sockets:
            listening = [open_sockets.enter_context(sockets.listening(each)) for each in stage.sockets()]
            gate_command = open_sockets.enter_context(gate.command()) if gate else None
            stage.process.start(
                stage.command(listening),
                stage.place.user,
                image=image,
                gated=listening[0] if gate else None,
                gate=gate_command,
                writable=stage.writable(),
                is_own_user=stage.place.is_own_user,
            )
        try:
            if hand_over:
                hand_over.begin(VIEWING, deks, base)
            else:
                stage.await_serving(deks, base)
            return
        except VirtSseError as exc:
            log, has_ended = stage.process.log, stage.process.pid() is None
            # On a busy machine, a qemu-storage-daemon in 300 ends or hangs before its monitor's greeting.
            if not log and not is_last and (has_ended or isinstance(exc, MonitorSilentError)):
                stage.process.stop()
                continue
            detail = f" ({log})" if log else " (the process has ended)" if has_ended else ""
            text = f"the {stage.title} cannot serve {path}: {exc}{detail}"
            raise StageError(text, hint=_DENIED_HINT if "Permission denied" in text else None) from exc

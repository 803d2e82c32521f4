"""Commands to the QEMU of a running domain, through libvirt (QEMU ``docs/interop/qmp-spec.txt``).

libvirt passes commands to QEMU's monitor and logs the domain as ``tainted: custom-monitor``, because libvirt
does not know the effect of a command.
"""

from __future__ import annotations

import json
from typing import Any

import libvirt
import libvirt_qemu

from virt_sse.errors import MonitorError


def ask(domain: libvirt.virDomain, command: str, **arguments: object) -> Any:
    """Have QEMU execute *command*; ``_`` in names of arguments stands for ``-``.

    :return: QEMU's answer, of any form: a guest may have taken over its QEMU.
    :raise MonitorError: When QEMU refuses the command or does not answer.
    """
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    request = json.dumps({"execute": command} | ({"arguments": named} if named else {}))
    try:
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))
    except (libvirt.libvirtError, ValueError, RecursionError) as exc:
        raise MonitorError(f"QEMU does not answer {command}: {exc}") from exc
    if not isinstance(answer, dict):
        raise MonitorError(f"QEMU does not answer {command} with an object")
    if "return" not in answer:
        error = answer.get("error")
        reason = error.get("desc", "no answer") if isinstance(error, dict) else "no answer"
        raise MonitorError(f"{command}: {reason}")
    return answer["return"]

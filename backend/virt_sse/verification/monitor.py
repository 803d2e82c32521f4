"""What a running domain's QEMU says of itself, through libvirt.

libvirt passes commands on to QEMU's monitor and, as it cannot know what they do, marks the domain ``tainted:
custom-monitor`` in its log. Ours only ask. libvirt's own XML tells what libvirt has meant, without a cipher,
and nothing of what others have told QEMU.
"""

from __future__ import annotations

import json
from typing import Any

import libvirt
import libvirt_qemu

from virt_sse.errors import MonitorError
from virt_sse.verification.graph import BlockGraph


def block_graph(domain: libvirt.virDomain) -> BlockGraph:
    """The block graph of a running domain.

    :raise MonitorError: When QEMU does not say.
    """
    return BlockGraph(
        _ask(domain, "query-named-block-nodes", flat=True),
        _ask(domain, "x-debug-query-block-graph"),
        _ask(domain, "query-jobs"),
        _ask(domain, "query-block-exports"),
    )


def _ask(domain: libvirt.virDomain, command: str, **arguments: object) -> Any:
    request = json.dumps({"execute": command} | ({"arguments": arguments} if arguments else {}))
    try:
        answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))
    except (libvirt.libvirtError, ValueError) as exc:
        raise MonitorError(f"QEMU does not answer to {command}: {exc}") from exc
    if "return" not in answer:
        raise MonitorError(f"{command}: {answer.get('error', {}).get('desc', 'no answer')}")
    return answer["return"]

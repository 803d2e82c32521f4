"""Queries to a running domain's QEMU, through libvirt.

libvirt passes commands to QEMU's monitor and logs the domain as ``tainted: custom-monitor``, because libvirt
does not know the effect of a command; these commands are read-only. libvirt's own XML is not sufficient: it
shows libvirt's intention, without ciphers, and not changes made in QEMU by other means.
"""

from __future__ import annotations

import json
from typing import Any

import libvirt
import libvirt_qemu

from virt_sse.errors import MonitorError
from virt_sse.verification.graph import BlockGraph


def block_graph(domain: libvirt.virDomain) -> BlockGraph:
    """Query the block graph of a running domain.

    :raise MonitorError: When QEMU refuses a query or does not answer.
    """
    return BlockGraph(
        _ask(domain, "query-named-block-nodes", flat=True),
        _ask(domain, "x-debug-query-block-graph"),
        _ask(domain, "query-jobs"),
        _ask(domain, "query-block-exports"),
    )


def secret_objects(domain: libvirt.virDomain) -> list[str]:
    """Query the ids of the secret objects in a running domain's QEMU (QEMU ``qapi/crypto.json``).

    :raise MonitorError: When QEMU refuses the query or does not answer.
    """
    listed = _ask(domain, "qom-list", path="/objects")
    try:
        return [str(each["name"]) for each in listed if str(each["type"]).startswith("child<secret")]
    except (KeyError, TypeError) as exc:
        raise MonitorError("QEMU lists its objects in an unknown format") from exc


def _ask(domain: libvirt.virDomain, command: str, **arguments: object) -> Any:
    request = json.dumps({"execute": command} | ({"arguments": arguments} if arguments else {}))
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

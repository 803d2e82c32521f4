"""Queries to a running domain's QEMU (:mod:`virt_sse.libvirt.monitor`); all are read-only.

libvirt's own XML is not sufficient: it shows libvirt's intention, without ciphers, and not changes made in
QEMU by other means.
"""

from __future__ import annotations

import libvirt

from virt_sse.errors import MonitorError
from virt_sse.libvirt.monitor import ask
from virt_sse.verification.graph import BlockGraph


def block_graph(domain: libvirt.virDomain) -> BlockGraph:
    """Query the block graph of a running domain.

    :raise MonitorError: When QEMU refuses a query or does not answer.
    """
    return BlockGraph(
        ask(domain, "query-named-block-nodes", flat=True),
        ask(domain, "x-debug-query-block-graph"),
        ask(domain, "query-jobs"),
        ask(domain, "query-block-exports"),
    )


def secret_objects(domain: libvirt.virDomain) -> list[str]:
    """Query the ids of the secret objects in a running domain's QEMU (QEMU ``qapi/crypto.json``).

    :raise MonitorError: When QEMU refuses the query or does not answer.
    """
    listed = ask(domain, "qom-list", path="/objects")
    try:
        return [str(each["name"]) for each in listed if str(each["type"]).startswith("child<secret")]
    except (KeyError, TypeError) as exc:
        raise MonitorError("QEMU lists its objects in an unknown format") from exc

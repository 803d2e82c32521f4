"""Latency of a guest's writes while a disk is copied: by QEMU's histogram of the guest's device."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence

import libvirt
import libvirt_qemu

from virt_sse.errors import LabError
from virt_sse.lab.host import LabHost

_DEVICE = "/machine/peripheral/virtio-disk0/virtio-backend"
_BOUNDARIES = [round(10_000 * 1.1**step) for step in range(150)]
"""Nanoseconds, from 10 microseconds to 15 seconds."""
SCRIPT = "while :; do dd if=/dev/zero of=/dev/vda bs=4k count=8192 oflag=direct 2>&-; done"
"""For a Linux guest: writes of 4 KiB, each after the end of the last."""


class WriteLatency:
    """The histogram of the first disk of a running domain, from now on (``block-latency-histogram-set``)."""

    def __init__(self, host: LabHost, domain: str) -> None:
        self._host = host
        self._domain = domain
        self._ask("block-latency-histogram-set", id=_DEVICE, boundaries=_BOUNDARIES)

    def percentile(self, percent: float) -> float:
        """The upper end of the bin with this percentile of the writes so far, in seconds.

        :raise LabError: When there are too few writes.
        """
        (disk,) = [each for each in self._ask("query-blockstats") if each.get("qdev") == _DEVICE]
        return _percentile(disk["stats"]["wr_latency_histogram"]["bins"], percent)

    def _ask(self, command: str, **arguments: object) -> list[dict]:
        request = json.dumps({"execute": command, "arguments": arguments})
        with contextlib.closing(self._host.connect()) as connection:
            domain: libvirt.virDomain = connection.lookupByName(self._domain)
            answer = json.loads(libvirt_qemu.qemuMonitorCommand(domain, request, 0))
        found: list[dict] = answer["return"]
        return found


def _percentile(bins: Sequence[int], percent: float) -> float:
    total = sum(bins)
    if total * (100 - percent) < 100:
        raise LabError(f"{total} writes of the guest are too few for a percentile")
    reached = 0
    for count, end in zip(bins, _BOUNDARIES, strict=False):
        reached += count
        if reached >= total * percent / 100:
            return end / 1e9
    raise LabError("the guest's writes take longer than all bins")

"""Starting a domain with double-layer disks: against a domain with the same number of single-layer disks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from domain import start_and_destroy
from hosts import double_set, prepared_host
from measurement import Measurement, Row, Run, Target
from virt_sse.backend import Backend
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.model.disks import NewDisk

if TYPE_CHECKING:
    import libvirt

_LATER_SECONDS = 0.5
"""Target: maximum delay of a start with four double-layer disks, compared to four single-layer disks."""
_DISKS = (1, 4)


def measure(bench: Run) -> Iterator[Row]:
    """Start until libvirt reports ``running``, in turns; first by the hook alone, then with an agent."""
    with prepared_host() as (host, backend), closing(host.connect()) as connection:
        domains = {
            (name, count): connection.defineXML(_xml(host, backend, name, encryption_set, count))
            for name, encryption_set in (("single", None), ("double", double_set(backend)))
            for count in _DISKS
        }
        yield from _rows(bench, "hook", "no agent", domains)
        with LabAgent(host):
            yield from _rows(bench, "agent", "agent", domains)


def _rows(
    bench: Run, served: str, description: str, domains: dict[tuple[str, int], libvirt.virDomain]
) -> Iterator[Row]:
    turns = [
        {name: start_and_destroy(domain) for name, domain in domains.items()}
        for _ in range(1 + bench.amount(5, quick=2))
    ]
    for count in _DISKS:
        for step, verb in enumerate(("start", "destroy")):
            single, double = (
                Measurement.median([turn[name, count][step] for turn in turns[1:]])
                for name in ("single", "double")
            )
            target = Target(seconds=single.value + _LATER_SECONDS) if (verb, count) == ("start", 4) else None
            yield Row(
                f"start/{served}/{verb}-{count}",
                f"{verb} a domain, {count} double disk{'s' if count > 1 else ''}, {description}",
                double,
                single,
                "same number of single-layer disks",
                target,
                {"difference_ms": (double.value - single.value) * 1000},
            )


def _xml(host: LabHost, backend: Backend, name: str, encryption_set: str | None, count: int) -> str:
    elements = []
    for letter in "abcd"[:count]:
        disk = f"{name}-{count}-{letter}"
        source = recipes.boot_sector_image(stays=True)
        backend.transfer.import_image(
            NewDisk(name=disk, encryption_set=encryption_set), source, source_format="raw"
        )
        elements.append(backend.domains.disk_element(disk, target=f"vd{letter}"))
    how = acceleration.probe("boot-sector", slow_kvm=True)
    return Guest(host, f"{name}-{count}", acceleration=how, disks=elements).xml()

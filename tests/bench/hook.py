"""The libvirt hook as a process, as run by libvirtd."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from hosts import double_set, prepared_host
from measurement import Row, Run, Target, alternate
from virt_sse.backend import Backend
from virt_sse.errors import LabError
from virt_sse.lab import guests
from virt_sse.lab.agents import LabAgent
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.disks import NewDisk

if TYPE_CHECKING:
    import libvirt


_AIMS = {"hook": Target(seconds=0.15), "agent": Target(seconds=0.04)}


def measure(bench: Run) -> Iterator[Row]:
    """Measure a domain without virt-sse disks, accepted before Python starts, then domains with one disk.

    The start of a domain waits for ``prepare``, the end for ``release``.
    """
    with prepared_host() as (host, backend):
        hook = backend.host.config.hook_path
        plain = _domain("plain", guests.disk_xml(host.images / "plain.img"))
        ours, peer = alternate(
            bench.amount(50, quick=20),
            event(hook, "prepare", plain),
            event(Path("/bin/true"), "prepare", plain),
        )
        yield Row(
            "hook/not-ours", "hook, domain without our disks", ours, peer, "/bin/true", Target(seconds=0.06)
        )

        sets = {"single": None, "double": double_set(backend)}
        with closing(host.connect()) as connection:
            domains = {name: defined(connection, backend, name, chosen) for name, chosen in sets.items()}
            yield from _rows(bench, hook, "hook", "no agent", domains)
            with LabAgent(host):
                yield from _rows(bench, hook, "agent", "agent", domains)
            event(hook, "prepare", domains["single"])()
            disk = backend.disks.get("single")
            if str(SecretName(disk.id, disk.deks[0].slot).uuid) not in connection.listSecrets():
                raise LabError("the hook did not set a secret")


def _rows(bench: Run, hook: Path, served: str, description: str, domains: Mapping[str, str]) -> Iterator[Row]:
    events = {
        (name, operation): event(hook, operation, xml)
        for name, xml in domains.items()
        for operation in ("prepare", "release")
    }
    took = alternate(bench.amount(15, quick=4), *events.values())
    for (name, operation), measured in zip(events, took, strict=True):
        aim = _AIMS[served] if (name, operation) == ("single", "prepare") else None
        yield Row(
            f"hook/{served}/{operation}-{name}",
            f"hook {operation}, one {name} disk, {description}",
            measured,
            target=aim,
            note="" if served == "agent" else "about 100 ms are Python's imports",
        )


def defined(connection: libvirt.virConnect, backend: Backend, name: str, encryption_set: str | None) -> str:
    """The definition of a domain with a disk, exactly as written by libvirt: the hook relies on this form."""
    backend.disks.create(NewDisk(name=name, size=1 << 20, encryption_set=encryption_set))
    definition: str = connection.defineXML(_domain(name, backend.domains.disk_element(name))).XMLDesc()
    return definition


def _domain(name: str, disk: str) -> str:
    return guests.domain_xml(name, domain_type="qemu", disks=[disk], serial_log=Path("/dev/null"))


def event(hook: Path, operation: str, xml: str) -> Callable[[], object]:
    """Call the hook with libvirt's arguments and libvirt's nearly empty environment."""
    command = [str(hook), "domain", operation, "begin", "-"]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"}
    return lambda: subprocess.run(
        command, input=xml.encode(), env=environment, capture_output=True, check=True
    )

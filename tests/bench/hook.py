"""The libvirt hook as a whole process, as libvirtd runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from hosts import prepared_host
from measurement import Row, Run, Target, alternate
from virt_sse.errors import LabError
from virt_sse.lab import guests
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.model.disks import NewDisk


def measure(bench: Run) -> Iterator[Row]:
    """On a domain without a disk of ours, which passes before Python is started, and on one with."""
    with prepared_host() as (host, backend):
        hook = backend.host.config.hook_path
        plain = _domain(guests.disk_xml(host.images / "plain.img"))
        ours, peer = alternate(
            bench.amount(50, quick=20),
            _event(hook, "prepare", plain),
            _event(Path("/bin/true"), "prepare", plain),
        )
        yield Row(
            "hook/not-ours", "hook, domain without our disks", ours, peer, "/bin/true", Target(seconds=0.06)
        )

        disk = backend.disks.create(NewDisk(name="data", size=1 << 20))
        with closing(host.connect()) as connection:
            # As libvirt writes it, quotes and all: the hook is made for that.
            encrypted: str = connection.defineXML(_domain(backend.domains.disk_element("data"))).XMLDesc()
            events = {name: _event(hook, name, encrypted) for name in ("prepare", "start", "release")}
            events["prepare"]()
            wanted = str(SecretName(disk.id, disk.deks[0].slot).uuid)
            if wanted not in connection.listSecrets():
                raise LabError("the hook has set no secret")
        for name, took in zip(events, alternate(bench.amount(10, quick=4), *events.values()), strict=True):
            yield Row(f"hook/{name}", f"hook {name}, one disk of ours", took)


def _domain(disk: str) -> str:
    return guests.domain_xml("bench", domain_type="qemu", disks=[disk], serial_log=Path("/dev/null"))


def _event(hook: Path, operation: str, xml: str) -> Callable[[], object]:
    """libvirt's arguments; and its environment, which is all but empty."""
    command = [str(hook), "bench", operation, "begin", "-"]
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C"}
    return lambda: subprocess.run(
        command, input=xml.encode(), env=environment, capture_output=True, check=True
    )

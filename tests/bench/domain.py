"""Starting a domain: with virt-sse's hook, against the same domain with a secret set by hand."""

from __future__ import annotations

import shutil
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from hosts import dek_of, prepared_host
from measurement import Measurement, Row, Run, seconds
from virt_sse.errors import LabError
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.libvirt.xml import parse_xml
from virt_sse.model.disks import NewDisk
from virt_sse.model.keys import Dek

if TYPE_CHECKING:
    import libvirt

_NAME = "bench"


def measure(bench: Run) -> Iterator[Row]:
    """Start until libvirt reports ``running``, then destroy; boot-sector guest, two lab hosts in turns."""
    how = acceleration.probe("boot-sector", slow_kvm=True)
    with prepared_host() as (ours, backend), LabHost() as peer:
        source = recipes.boot_sector_image(stays=True)
        disk = backend.transfer.import_image(NewDisk(name="boot"), source, source_format="raw")
        element = backend.domains.disk_element("boot")
        with closing(ours.connect()) as here, closing(peer.connect()) as there:
            by_hand = set_by_hand(there, peer, element, disk.path, dek_of(backend, disk))
            domains = [
                here.defineXML(Guest(ours, _NAME, acceleration=how, disks=[element]).xml()),
                there.defineXML(Guest(peer, _NAME, acceleration=how, disks=[by_hand]).xml()),
            ]
            turns = [[start_and_destroy(each) for each in domains] for _ in range(bench.amount(11, quick=4))]
    for step, verb in enumerate(("start", "destroy")):
        with_hook, without = (
            Measurement.median([turn[side][step] for turn in turns[1:]]) for side in range(len(domains))
        )
        yield Row(
            f"domain/{verb}",
            f"{verb} a domain, one qcow2 disk ({how.domain_type})",
            with_hook,
            without,
            "secret set by hand, no hook",
            details={"difference_ms": (with_hook.value - without.value) * 1000},
        )


def set_by_hand(connection: libvirt.virConnect, host: LabHost, element: str, image: Path, dek: Dek) -> str:
    """Copy the image and set its DEK like an administrator; returns the ``<disk>`` element of the copy."""
    copy = host.images / image.name
    shutil.copyfile(image, copy)
    name = str(uuid.uuid4())
    secret = connection.secretDefineXML(
        f"<secret private='yes'><uuid>{name}</uuid>"
        f"<usage type='volume'><volume>{copy}</volume></usage></secret>"
    )
    secret.setValue(dek.passphrase)
    disk = parse_xml(element, kind="disk element")
    for source in disk.iter("source"):
        source.set("file", str(copy))
    for reference in disk.iter("secret"):
        reference.attrib = {"type": "passphrase", "uuid": name}
    return ET.tostring(disk, encoding="unicode")


def start_and_destroy(domain: libvirt.virDomain) -> tuple[float, float]:
    """Durations of start and destroy, in seconds."""
    import libvirt

    def start() -> None:
        domain.create()
        state, _ = domain.state()
        if state != libvirt.VIR_DOMAIN_RUNNING:
            raise LabError(f"domain {_NAME} is in state {state} after its start")

    return seconds(start), seconds(domain.destroy)

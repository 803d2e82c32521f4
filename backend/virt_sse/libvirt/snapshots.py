"""Snapshots of domains (libvirt formatsnapshot)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from virt_sse.libvirt.xml import parse_xml


@dataclass(frozen=True, slots=True)
class SnapshotFiles:
    """Files of a snapshot.

    :ivar disks: the overlays; the current directory for a disk without a file.
    :ivar has_memory: whether the guest's memory is in a file.
    :ivar memory: the file with the guest's memory; empty if unknown.
    """

    disks: frozenset[Path]
    has_memory: bool
    memory: str

    @classmethod
    def parse(cls, xml: str) -> Self:
        """Read snapshot XML.

        :raise InvalidValueError: When *xml* is malformed.
        """
        root = parse_xml(xml, kind="snapshot XML")
        memory = root.find("./memory[@snapshot='external']")
        return cls(
            disks=frozenset(Path(source.get("file", "")) for source in root.iterfind("./disks/disk/source")),
            has_memory=memory is not None,
            memory=memory.get("file", "") if memory is not None else "",
        )

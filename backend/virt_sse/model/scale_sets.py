"""Scale sets: domains made from one definition and one disk."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

MAX_INSTANCES = 1000


@dataclass(frozen=True, slots=True)
class Instance:
    """One domain of a scale set, with one disk.

    :ivar number: from 1; part of the names of domain and disk.
    :ivar domain_id: UUID of the domain; chosen before the domain is defined.
    :ivar disk_id: id of the disk; chosen before each attempt to make the disk.
    :ivar encryption_at_host: whether the set had encryption at host when the instance was planned.
    """

    number: int
    domain_id: UUID
    disk_id: UUID
    encryption_at_host: bool


@dataclass(frozen=True, slots=True)
class ScaleSet:
    """A scale set as wanted. The instances become as wanted by the current command or the next.

    :ivar definition: domain XML without name, UUID and disk; each instance gets its own.
    :ivar image_id: id of the disk that is copied for each instance.
    :ivar size: wanted number of instances.
    :ivar encryption_at_host: whether new instances get encryption at host.
    :ivar is_deleting: whether the set is to be removed with its last instance.
    :ivar instances: all planned instances, by number.
    """

    id: UUID
    name: str
    definition: str
    image_id: UUID
    size: int
    encryption_at_host: bool
    created: datetime
    is_deleting: bool = False
    instances: tuple[Instance, ...] = ()

    def instance_name(self, number: int) -> str:
        """The name of an instance's domain and disk."""
        return f"{self.name}-{number}"

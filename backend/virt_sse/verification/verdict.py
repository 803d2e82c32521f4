"""Results of a verification: the layers of each disk, the places of its data, and problems."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that a disk's data passes, or is stored in.

    :ivar where: ``guest's QEMU``, ``host cache``, ``storage daemon`` or ``image``.
    :ivar cipher: cipher of the data on the storage side of the layer, from the volume's header; ``None`` if
        unknown.
    :ivar slot: slot of the DEK for the volume.
    :ivar key: KEK, with version, of the DEK.
    :ivar detail: further observations, e.g. a path.
    """

    where: str
    cipher: str | None
    slot: str | None = None
    key: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DataPlace:
    """A place with data of a disk, and whether the data is plaintext there."""

    where: str
    is_plaintext: bool


@dataclass(slots=True)
class DiskVerdict:
    """The result for a disk of the domain, filled in during the verification.

    :ivar target: device name in the guest; ``-`` for a disk outside of the domain's definition.
    :ivar disk: name of a managed disk.
    :ivar asked: requested encryption type.
    :ivar caching: requested host caching.
    :ivar placement: requested placement of the DEKs.
    :ivar problems: differences from the request, as text.
    """

    target: str
    disk: str | None = None
    asked: str | None = None
    caching: str | None = None
    placement: str | None = None
    layers: list[Layer] = field(default_factory=list)
    places: list[DataPlace] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> bool:
        """Add *problem* unless *holds*; return *holds*."""
        if not holds and problem not in self.problems:
            self.problems.append(problem)
        return holds


@dataclass(frozen=True, slots=True)
class AtRestFinding:
    """Data of the guest at rest on the host, apart from disks."""

    what: str
    where: str | None
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessCode:
    """The XTS library in a process that encrypts the domain's data.

    :ivar process: ``guest's QEMU``, or the kind of stage process with the disk's target.
    :ivar library: the value of a :class:`~virt_sse.system.guest_library.LibraryInUse`.
    """

    process: str
    pid: int
    library: str


@dataclass(frozen=True, slots=True)
class DomainVerdict:
    """The result for a domain.

    :ivar accelerate: whether the definition asks for the XTS library in the domain's QEMU.
    :ivar processes: the processes visible in this PID namespace.
    :ivar places: places with data of all disks.
    :ivar problems: problems of the domain itself, without its disks' problems.
    """

    domain: str
    runs: bool
    encryption_at_host: bool
    disks: tuple[DiskVerdict, ...]
    places: tuple[DataPlace, ...] = ()
    at_rest: tuple[AtRestFinding, ...] = ()
    problems: tuple[str, ...] = ()
    accelerate: bool = False
    processes: tuple[ProcessCode, ...] = ()

    @property
    def all_problems(self) -> list[str]:
        """All problems of the domain and its disks; empty if the domain is as requested."""
        of_disks = [f"{each.target}: {problem}" for each in self.disks for problem in each.problems]
        return [*self.problems, *of_disks]

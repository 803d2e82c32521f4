"""What a verification has found: each disk's layers, where its plaintext is, and what is not as asked for."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Layer:
    """What a disk's data passes, or lies in.

    :ivar where: ``guest's QEMU``, ``host cache``, ``storage daemon`` or ``image``.
    :ivar cipher: what the data is encrypted with on its side towards the storage, by the volume's header;
        ``None`` when it cannot be told.
    :ivar slot: of the DEK that opens the volume.
    :ivar key: the KEK, with its version, that the DEK is under.
    :ivar detail: what else was seen.
    """

    where: str
    cipher: str | None
    slot: str | None = None
    key: str | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class DataPlace:
    """Where data of a disk is, and in what state."""

    where: str
    is_plaintext: bool


@dataclass(slots=True)
class DiskVerdict:
    """A disk of the domain; filled in while it is looked at.

    :ivar target: its name in the guest; ``-`` for one that is no disk of the guest's.
    :ivar disk: the name of a disk of ours.
    :ivar asked: what was asked for: the encryption type, and what the host is to cache.
    :ivar problems: what is not as it was asked for, in words.
    """

    target: str
    disk: str | None = None
    asked: str | None = None
    caching: str | None = None
    layers: list[Layer] = field(default_factory=list)
    places: list[DataPlace] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def expect(self, holds: bool, problem: str) -> bool:
        """Note *problem* unless it *holds*, which is returned."""
        if not holds and problem not in self.problems:
            self.problems.append(problem)
        return holds


@dataclass(frozen=True, slots=True)
class AtRestFinding:
    """What else of the guest lies on the host at rest."""

    what: str
    where: str | None
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A domain.

    :ivar places: where all its disks' data is.
    :ivar problems: of the domain itself; its disks have their own.
    """

    domain: str
    runs: bool
    encryption_at_host: bool
    disks: tuple[DiskVerdict, ...]
    places: tuple[DataPlace, ...] = ()
    at_rest: tuple[AtRestFinding, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def all_problems(self) -> list[str]:
        """Those of the domain and of its disks; none when what runs is what was asked for."""
        of_disks = [f"{each.target}: {problem}" for each in self.disks for problem in each.problems]
        return [*self.problems, *of_disks]

"""The interface of a kind of stage process, and the place of a process on a disk's data path.

A kind is a module with a subclass of :class:`StageProcess`, listed in :mod:`~virt_sse.stages.kinds`. A
process serves one stage of a layer's plan, or adjacent stages of its kind. The subclass says how its process
is launched, seen to serve, restarted, recorded and verified; :class:`Stages <virt_sse.stages.stages.Stages>`
does so for all kinds alike. The subclass may also define its own part of a layer's plan, a subclass of
:class:`~virt_sse.model.layers.Stage`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, Protocol, TypeVar
from uuid import UUID

import msgspec

from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.keys import Dek
from virt_sse.model.layers import Stage
from virt_sse.qemu.storage_daemon import StorageDaemon
from virt_sse.qemu.unlocking import BaseImage
from virt_sse.stages.locked_process import Command, LockedProcess
from virt_sse.stages.sockets import ListeningSocket, await_greeting

StageT = TypeVar("StageT", bound=Stage)
RecordValue = str | int | bool | list[str] | None


@dataclass(frozen=True, slots=True)
class ImageSource:
    """The disk's image: the source of the process next to the storage."""

    path: Path


@dataclass(frozen=True, slots=True)
class ExportSource:
    """The NBD export of the next process towards the storage.

    :ivar export: the export's name.
    """

    socket: Path
    export: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlace:
    """Surroundings of a stage process.

    :ivar format: format of the disk's image.
    :ivar source: where the process reads and writes the disk's data.
    :ivar served: the socket at which the process serves the disk by NBD.
    :ivar export: name of the NBD export at *served*.
    :ivar decrypts_all: whether the guest's QEMU has no DEK: the process at its socket serves plaintext.
    :ivar user: the user that runs the process.
    :ivar is_own_user: whether no other process has this user.
    :ivar folder: private folder, root's, for locks, logs and monitor sockets of the disk's stage processes.
    :ivar cache_directory: the host's folder for host caches, with a folder per disk.
    :ivar base: path of the image below a linked clone.
    """

    disk_id: UUID
    format: DiskFormat
    source: ImageSource | ExportSource
    served: ListeningSocket
    export: str
    decrypts_all: bool
    user: User
    is_own_user: bool
    folder: Path
    cache_directory: Path
    base: Path | None = None


@dataclass(frozen=True, slots=True)
class RecordField:
    """A kind's field of the disk's stage record, ``stages.json``.

    :ivar name: snake case; the record has the name in kebab case.
    :ivar type: a type known to msgspec.
    :ivar default: the value if the field is missing, as in records written before the kind existed; without a
        default the field is required.
    """

    name: str
    type: object
    default: object = msgspec.NODEFAULT


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedEvidence:
    """Facts about a running process for ``vm verify`` to check, beyond its listening socket and its source.

    :ivar data: description of the disk data in the process.
    :ivar is_plaintext: whether the data in the process is plaintext. Only in the memory of a process that
        decrypts the disk's first layer.
    :ivar arguments: required command-line arguments, each with the problem to report if missing.
    :ivar monitor: monitor of a QEMU process; the block graph must be just the image and the volumes under
        the DEKs in :attr:`StageProcess.slots`.
    :ivar unnamed_files: folder of the process's unnamed files; their content must be ciphertext.
    """

    data: str
    is_plaintext: bool = False
    arguments: Mapping[str, str] = field(default_factory=dict)
    monitor: StorageDaemon | None = None
    unnamed_files: Path | None = None


class Growable(Protocol):
    """Nested volumes able to grow while a guest uses the disk."""

    def sizes(self) -> list[int]:
        """Sizes in bytes, innermost volume first."""

    def grow(self, sizes: Sequence[int], export: str) -> None:
        """Grow to *sizes* bytes; the client of the export then has to connect again."""


class StageProcess(ABC, Generic[StageT]):
    """A stage process of a disk; each kind is a subclass.

    :cvar name: names the process's lock and log files, and the process in the agent's log.
    :cvar title: names the process in messages.
    :cvar stage_type: the kind's part of a layer's plan.
    :cvar serves_several: whether one process serves adjacent stages of the kind.
    :cvar record_field: the kind's field of the disk's stage record.
    :cvar inner_socket: name of the socket if another stage process is between the process and the guest.
    :cvar is_qemu: whether QEMU's block layer opens the image: QEMU opens the image once, locks the image and
        grows a qcow2 file by itself. For any other program the host locks and grows the image, and the
        program's user owns the image as long as the program runs: nbdkit opens the image per connection.
    :cvar growth_hint: how to grow a disk if the process cannot grow (:meth:`growable`).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    stage_type: ClassVar[type[Stage]]
    serves_several: ClassVar[bool] = False
    record_field: ClassVar[RecordField]
    inner_socket: ClassVar[str]
    is_qemu: ClassVar[bool] = False
    growth_hint: ClassVar[str] = "stop the domain first"

    def __init__(self, stages: Sequence[StageT], place: StagePlace) -> None:
        self.stages = tuple(stages)
        self.place = place
        self.process = LockedProcess(place.folder / self.name)

    @property
    def stage(self) -> StageT:
        """The process's first stage: the only stage unless :attr:`serves_several`."""
        return self.stages[0]

    @classmethod
    @abstractmethod
    def to_record(cls, stages: Sequence[StageT]) -> RecordValue:
        """The value of :attr:`record_field` for a disk with *stages* of the kind, if any, guest first."""

    @classmethod
    @abstractmethod
    def from_record(cls, value: object) -> Sequence[StageT]:
        """The inverse of :meth:`to_record`."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Slots of the process's DEKs, guest first; empty for a process without a DEK."""
        return ()

    @property
    @abstractmethod
    def keeps_acknowledged_writes(self) -> bool:
        """Whether acknowledged writes outlive the process; if so, a restart under a running guest is safe.

        If not, a new process would answer with older data, and the guest would not notice.
        """

    def prepare(self) -> None:
        """Prepare files and folders for the process.

        :raise OSError: When that fails.
        """

    def sockets(self) -> Sequence[ListeningSocket]:
        """Listening sockets for the process to inherit, the NBD server's first."""
        return [self.place.served]

    def writable(self) -> Sequence[Path]:
        """The files and folders that the process may change: Landlock denies all others."""
        return [self.place.source.path] if isinstance(self.place.source, ImageSource) else []

    @abstractmethod
    def command(self, listening: Sequence[int]) -> Command:
        """The program to run.

        :param listening: descriptors of :meth:`sockets`, in the same order.
        """

    def await_serving(self, deks: Sequence[Dek], base: BaseImage | None = None) -> None:
        """Return once the process serves the disk. The default waits for an NBD greeting.

        :param deks: the DEKs of :attr:`slots`, in the same order.
        :param base: the image below a linked clone.
        :raise VirtSseError: When the process ends first, or does not serve in time.
        """
        await_greeting(self.place.served.path)

    @property
    def has_network(self) -> bool:
        """Whether the process reaches the host's network: its image is in Ceph."""
        return False

    def growable(self) -> Growable | None:
        """The volumes to grow if the disk grows under a running guest; ``None`` if that is impossible."""
        return None

    @abstractmethod
    def evidence(self) -> ExpectedEvidence:
        """The facts for ``vm verify`` to check while the process runs."""

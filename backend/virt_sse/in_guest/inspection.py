"""Looking for in-guest encryption: on a whole disk, in its partitions, and in the volumes in these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from virt_sse.errors import ImageFormatError, PolicyError, VirtSseError
from virt_sse.in_guest.containers import volumes
from virt_sse.in_guest.partitions import Partition, Read, partitions
from virt_sse.in_guest.signatures import EncryptionKind, kinds

WHOLE_DISK = "disk"

_DEPTH = 3
"""An MD array in a partition, a physical volume of LVM in that, and a logical volume."""

_MOST_READS, _MOST_BYTES = 40_000, 256 << 20
"""What looking at one disk may take. One with 256 partitions and as many logical volumes takes 7000 reads."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A volume on a disk that the guest has encrypted.

    :ivar partition: ``disk`` for all of it; ``gpt-2``; for a volume in a partition ``gpt-2/lvm``.
    :ivar offset: in bytes, from the disk's beginning.
    :ivar size: in bytes; for a volume in a partition up to that one's end.
    """

    partition: str
    offset: int
    size: int
    kind: EncryptionKind


def inspect(read: Read, size: int) -> list[Finding]:
    """What is encrypted on a disk of *size* bytes, by offset.

    :raise ImageFormatError: When its guest has made so much of it that it is not looked at to the end.
    """
    read = _Bounded(read, size)
    found = list(_within(read, Partition(WHOLE_DISK, 0, size), depth=_DEPTH))
    for partition in partitions(read, size):
        found += _within(read, partition, depth=_DEPTH)
    first = {(finding.offset, finding.kind): finding for finding in reversed(found)}
    return sorted(first.values(), key=lambda finding: (finding.offset, finding.kind.value))


def _within(read: Read, partition: Partition, *, depth: int) -> Iterator[Finding]:
    def read_within(offset: int, length: int) -> bytes:
        return read(partition.offset + offset, max(0, min(length, partition.size - offset)))

    for kind in kinds(read_within):
        yield Finding(partition.name, partition.offset, partition.size, kind)
    if depth > 1:
        for volume in volumes(read_within, partition.size):
            name = f"{partition.name}/{volume.name}"
            inner = Partition(name, partition.offset + volume.offset, volume.size)
            yield from _within(read, inner, depth=depth - 1)


class _Bounded:
    """Reads from a disk until it has become too much; nothing beyond the disk's end."""

    def __init__(self, read: Read, size: int) -> None:
        self._read = read
        self._size = size
        self._reads = self._bytes = 0

    def __call__(self, offset: int, length: int) -> bytes:
        length = min(length, self._size - offset)
        if length <= 0:
            return b""
        self._reads += 1
        self._bytes += length
        if self._reads > _MOST_READS or self._bytes > _MOST_BYTES:
            raise ImageFormatError("the guest has made more volumes on it than are looked at")
        return self._read(offset, length)


class Content:
    """What a disk holds, or is to hold: looked at once, and only if a policy asks, because it takes a key."""

    def __init__(self, look: Callable[[], Sequence[Finding]]) -> None:
        self._look = look
        self._findings: tuple[Finding, ...] | None = None

    def in_guest_encryption(self) -> tuple[Finding, ...]:
        """What of it the guest has encrypted.

        :raise PolicyError: When that cannot be seen.
        """
        if self._findings is None:
            try:
                self._findings = tuple(self._look())
            except PolicyError:
                raise
            except VirtSseError as exc:
                raise PolicyError(f"cannot see whether it has in-guest encryption: {exc}") from exc
        return self._findings


def described(findings: Sequence[Finding]) -> str:
    """In words: the kinds and where, e.g. ``LUKS2 (gpt-2)``."""
    return ", ".join(dict.fromkeys(f"{finding.kind.value} ({finding.partition})" for finding in findings))

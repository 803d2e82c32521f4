"""Names of Ceph RBD images, as places of disks: ``rbd:POOL/IMAGE``, in the store and on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from virt_sse.errors import InvalidValueError

PREFIX = "rbd:"
_NAME = re.compile(r"rbd:([A-Za-z0-9._-]{1,80})/([A-Za-z0-9._-]{1,80})")
"""Without ``@`` of snapshots and ``:`` of options; a further ``/`` would be that of a namespace."""


def is_rbd(path: Path) -> bool:
    """Whether a place of an image is in Ceph: paths of files are absolute."""
    return str(path).startswith(PREFIX)


@dataclass(frozen=True, slots=True)
class RbdName:
    """The name of an RBD image.

    :ivar pool: the pool, without a namespace.
    :ivar image: the image in the pool.
    """

    pool: str
    image: str

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read a place of :func:`is_rbd`.

        :raise InvalidValueError: When the place is malformed.
        """
        if not (match := _NAME.fullmatch(str(path))):
            raise InvalidValueError(
                f"invalid RBD image {str(path)[:80]!r}",
                hint="rbd:POOL/IMAGE, of letters, digits, '.', '_' and '-'",
            )
        return cls(match[1], match[2])

    @property
    def path(self) -> Path:
        """The place that :meth:`of` reads."""
        return Path(f"{PREFIX}{self}")

    def __str__(self) -> str:
        """As Ceph and libvirt write the name."""
        return f"{self.pool}/{self.image}"

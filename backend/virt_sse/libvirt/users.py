"""User and group of QEMU processes (libvirt's DAC security model)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from virt_sse.errors import ConfigError

_LABEL = re.compile(r"\+?(\d{1,10}):\+?(\d{1,10})", re.ASCII)
_IDS = range(2**32 - 1)
"""Without ``(uid_t) -1``, which means "unchanged" to chown(2)."""


@dataclass(frozen=True, slots=True)
class User:
    """Numeric user and group, as owners of files and processes."""

    uid: int
    gid: int

    @classmethod
    def parse(cls, label: str) -> Self:
        """Read a label such as ``+64055:+108``.

        :raise ConfigError: When *label* is malformed.
        """
        match = _LABEL.fullmatch(label)
        if not match or not (int(match[1]) in _IDS and int(match[2]) in _IDS):
            raise ConfigError(f"libvirt runs QEMU as {label[:40]!r}, not as a numeric user and group")
        return cls(int(match[1]), int(match[2]))


ROOT = User(0, 0)

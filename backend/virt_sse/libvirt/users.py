"""User and group of QEMU processes (libvirt's DAC security model)."""

from __future__ import annotations

import contextlib
import grp
import pwd
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from virt_sse.errors import ConfigError

_NUMBER = re.compile(r"\+?(\d{1,10})", re.ASCII)
_IDS = range(2**32 - 1)
"""Without ``(uid_t) -1``, which means "unchanged" to chown(2)."""


@dataclass(frozen=True, slots=True)
class User:
    """Numeric user and group, as owners of files and processes."""

    uid: int
    gid: int

    @classmethod
    def parse(cls, label: str) -> Self:
        """Read a label such as ``+64055:+108`` or ``libvirt-qemu:kvm``.

        As libvirt's ``virParseOwnershipIds``: a name comes before a number, unless after ``+``. A user may be
        called ``108``.

        :raise ConfigError: When *label* is malformed, or names no user or group.
        """
        owner, separator, group = label.partition(":")
        uid = _id(owner, lambda name: pwd.getpwnam(name).pw_uid)
        gid = _id(group, lambda name: grp.getgrnam(name).gr_gid)
        if not separator or uid is None or gid is None:
            raise ConfigError(f"libvirt runs QEMU as {label[:40]!r}, not as a user and group of this host")
        return cls(uid, gid)


def _id(text: str, of_name: Callable[[str], int]) -> int | None:
    """The number of a user or group; ``None`` if there is none."""
    if not text.startswith("+"):
        with contextlib.suppress(KeyError, ValueError):  # no such name; a name with a null byte
            return of_name(text)
    match = _NUMBER.fullmatch(text)
    return int(match[1]) if match and int(match[1]) in _IDS else None


ROOT = User(0, 0)

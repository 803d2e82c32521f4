"""The user that runs a PKCS#11 module's process."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from typing import Self

from virt_sse.errors import InvalidValueError


@dataclass(frozen=True, slots=True)
class WorkerUser:
    """User, group and supplementary groups of a process.

    :ivar groups: for instance the group allowed to use an HSM's device or socket.
    """

    uid: int
    gid: int
    groups: tuple[int, ...]

    @classmethod
    def named(cls, name: str) -> Self:
        """The user account called *name*, with all of its groups.

        :raise InvalidValueError: When there is no such account.
        """
        try:
            entry = pwd.getpwnam(name)
            groups = os.getgrouplist(name, entry.pw_gid)
        except (KeyError, ValueError) as exc:  # ValueError: not UTF-8, or with a zero byte
            raise InvalidValueError(f"no user {name[:80]!r}") from exc
        return cls(entry.pw_uid, entry.pw_gid, tuple(groups))

"""The users of stage processes: a user id for each process, or a single configured user for all."""

from __future__ import annotations

import os
import pwd
from collections.abc import Collection, Sequence
from itertools import chain, islice
from pathlib import Path
from uuid import UUID

from virt_sse.errors import ConfigError, StageError
from virt_sse.libvirt.users import User

_UID_MAP = Path("/proc/self/uid_map")


def storage_user(configured: str) -> User:
    """The user *configured* for all stage processes, by name or number.

    :raise ConfigError: When *configured* is an unknown user or root.
    """
    if configured.isascii() and configured.isdecimal():
        try:
            user = User.parse(f"+{configured}:+{configured}")
        except ConfigError as exc:
            raise ConfigError(f"no user {configured[:80]!r}, 'storage-user' in [host]") from exc
    else:
        try:
            entry = pwd.getpwnam(configured)
        except (KeyError, ValueError) as exc:  # not UTF-8, or with a zero byte
            raise ConfigError(f"no user {configured[:80]!r}, 'storage-user' in [host]") from exc
        user = User(entry.pw_uid, entry.pw_gid)
    if user.uid == 0:
        raise ConfigError("'storage-user' in [host] must not be root")
    return user


def own_users(
    uids: range, disk_id: UUID, processes: Sequence[str], taken: Collection[int]
) -> dict[str, User]:
    """A user for each of a disk's *processes*: by name, guest first; no account is needed.

    The search begins at a number derived from the disk's id. So the process next to the storage has the same
    user at each start, as a rule: an image whose ownership a crash has left behind belongs to the disk's own
    process. A user id is free once all processes with the id have ended. All processes of a disk share the
    group, whose number is the user id of the process next to the storage.

    :param taken: user ids of other disks' processes, running or not.
    :raise StageError: When too few of *uids* are free.
    :raise ConfigError: When the user namespace lacks *uids*.
    """
    if not is_mapped(uids):
        raise ConfigError(
            f"the user namespace has no user ids {uids[0]}-{uids[-1]}, 'storage-uids' in [host]",
            hint="set 'storage-uids' to ids of the namespace (/proc/self/uid_map), or set 'storage-user'",
        )
    begin = disk_id.int % len(uids)
    candidates = chain(uids[begin:], uids[:begin])
    free = (uid for uid in candidates if uid not in taken and not _has_processes(uid))
    chosen = list(islice(free, len(processes)))
    if len(chosen) < len(processes):
        raise StageError(
            f"too few free user ids in {uids[0]}-{uids[-1]}, 'storage-uids' in [host]",
            hint="each storage daemon and each host cache of a running domain needs an id: widen the range",
        )
    return {name: User(uid, chosen[0]) for name, uid in zip(reversed(processes), chosen, strict=True)}


def is_mapped(uids: range) -> bool:
    """Whether processes of this user namespace can have all of *uids*."""
    for line in _UID_MAP.read_text().splitlines():
        first, _, count = map(int, line.split())
        if first <= uids[0] and uids[-1] < first + count:
            return True
    return False


def _has_processes(uid: int) -> bool:
    """Whether any process has the real user id *uid*: getpriority(2) looks at all processes of a user."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True

"""The user of stage processes."""

from __future__ import annotations

import pwd

from virt_sse.errors import ConfigError
from virt_sse.libvirt.users import User

DEFAULT_STORAGE_USER = "virt-sse"
"""Created by ``virt-sse host init``."""

NOBODY = User(65534, 65534)


def storage_user(configured: str | None, qemu: User) -> User:
    """The user of stage processes.

    The order: *configured*; the user ``virt-sse``; QEMU's user, and then an escaped guest can reach the
    processes; ``nobody`` if QEMU runs as root.

    :raise ConfigError: When *configured* is an unknown user or root.
    """
    if configured is not None and configured.isascii() and configured.isdecimal():
        try:
            user = User.parse(f"{configured}:{configured}")
        except ConfigError as exc:
            raise ConfigError(f"no user {configured[:80]!r}, 'storage-user' in [host]") from exc
    else:
        try:
            entry = pwd.getpwnam(DEFAULT_STORAGE_USER if configured is None else configured)
        except (KeyError, ValueError) as exc:  # not UTF-8, or with a zero byte
            if configured is None:
                return qemu if qemu.uid else NOBODY
            raise ConfigError(f"no user {configured[:80]!r}, 'storage-user' in [host]") from exc
        user = User(entry.pw_uid, entry.pw_gid)
    if user.uid == 0:
        raise ConfigError("'storage-user' in [host] must not be root")
    return user

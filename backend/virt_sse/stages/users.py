"""As whom processes between QEMU and the storage run."""

from __future__ import annotations

import pwd

from virt_sse.errors import ConfigError
from virt_sse.libvirt.users import User

DEFAULT_STORAGE_USER = "virt-sse"
"""Made by ``virt-sse host init``."""

NOBODY = User(65534, 65534)


def storage_user(configured: str | None, qemu: User) -> User:
    """Whom storage processes run as.

    *configured*; else the user ``virt-sse``; where there is none, QEMU's: a guest that takes its QEMU over
    can then reach them. Where QEMU's is root, nobody.

    :raise ConfigError: When *configured* is no user, or root.
    """
    if configured is not None and configured.isascii() and configured.isdecimal():
        user = User(int(configured), int(configured))
    else:
        try:
            entry = pwd.getpwnam(DEFAULT_STORAGE_USER if configured is None else configured)
        except KeyError as exc:
            if configured is None:
                return qemu if qemu.uid else NOBODY
            raise ConfigError(f"no user {configured!r}, 'storage-user' in [host]") from exc
        user = User(entry.pw_uid, entry.pw_gid)
    if user.uid == 0:
        raise ConfigError("'storage-user' in [host] must not be root")
    return user

"""Storage pools of libvirt that are folders."""

from __future__ import annotations

from pathlib import Path

import libvirt

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.connection import connected
from virt_sse.libvirt.xml import parse_xml

_FOLDER_POOLS = ("dir", "fs", "netfs")


def pool_folder(uri: str, name: str) -> Path:
    """The folder of the storage pool *name*.

    :raise InvalidValueError: When the pool does not exist, is not active, or is not a folder.
    :raise LibvirtUnavailableError: When libvirt does not answer.
    """
    with connected(uri) as connection:
        pool = _lookup(connection, name)
        root = parse_xml(pool.XMLDesc(), kind="pool XML")
        if root.get("type") not in _FOLDER_POOLS:
            raise InvalidValueError(
                f"storage pool {name!r} is of type {root.get('type')!r}, not a folder",
                hint="the path of a volume that is a block device can be given instead",
            )
        if not pool.isActive():
            raise InvalidValueError(f"storage pool {name!r} is not active", hint=f"virsh pool-start {name}")
        return Path(root.findtext("target/path", ""))


def refresh_pool(uri: str, name: str) -> None:
    """Make libvirt list new and removed images of the storage pool *name*.

    :raise InvalidValueError: When the pool does not exist.
    :raise LibvirtError: When libvirt fails.
    """
    with connected(uri) as connection:
        _lookup(connection, name).refresh()


def volume_path(connection: libvirt.virConnect, pool: str, volume: str) -> Path:
    """The path of a volume of a storage pool.

    :raise libvirt.libvirtError: When no such volume exists, or libvirt fails.
    """
    return Path(connection.storagePoolLookupByName(pool).storageVolLookupByName(volume).path())


def _lookup(connection: libvirt.virConnect, name: str) -> libvirt.virStoragePool:
    try:
        return connection.storagePoolLookupByName(name)
    except (libvirt.libvirtError, UnicodeEncodeError) as exc:
        raise InvalidValueError(f"no storage pool {name!r}: {exc}") from exc

"""Incremental copies: images with what changed since the copy before of the same disk.

While a domain runs, QEMU keeps a dirty bitmap since each copy, and the next copy reads exactly what changed.
Without such a bitmap (of a stopped domain, after a restart of the domain, of a disk that has taken the place
of another) the whole content is compared with the content of the copy below, and what differs is written.
Either way the copy has the content of the disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from virt_sse.errors import VirtSseError
from virt_sse.keys.copy_chains import LONGEST, copies_below
from virt_sse.keys.host import Host
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_lines import owners
from virt_sse.model.disks import Disk, DiskState, NewDisk
from virt_sse.system.rbd_names import is_rbd


def incremental(
    host: Host, new: NewDisk, *, suits: Callable[[Disk], bool] = lambda _: True
) -> tuple[NewDisk, str | None]:
    """Base a new copy on the newest copy of the same kind and disk.

    :param suits: whether a copy may be the one below.
    :return: the copy; and if it is to be a full copy, the reason.
    """
    assert new.source is not None  # noqa: S101 -- of a copy
    title = new.kind.title
    if is_rbd(new.source.path) or (isinstance(new.place, Path) and is_rbd(new.place)):
        return new, f"disk {new.source.name!r} or its {title} is in Ceph"
    known = host.store.all()
    owner = owners(known)
    ready = [
        each
        for each in known
        if each.kind is new.kind
        and each.state is DiskState.READY
        and suits(each)
        and (disk := owner.get(each.id))
        and disk.id == new.source.id
    ]
    if not ready:
        return new, f"there is no {title} of disk {new.source.name!r} to be based on"
    base = _newest(ready)
    try:
        below = copies_below(host, base)
        host.freshness.check(base)
    except VirtSseError as exc:
        return new, f"{title} {base.name!r} cannot be read: {exc}"
    if len(below) + 2 > LONGEST:
        return new, f"the chain of {title} {base.name!r} has {LONGEST} links"
    place = new.place
    if isinstance(place, Path) and place.name == f"{new.name}.{new.format.value}":
        place = place.with_name(f"{new.name}.{DiskFormat.QCOW2.value}")
    return dataclasses.replace(new, base=base, format=DiskFormat.QCOW2, place=place), None


def _newest(copies: Sequence[Disk]) -> Disk:
    """The newest copy; of copies made within a second, the one that no other is based on."""
    newest = max(each.created for each in copies)
    last = [each for each in copies if each.created == newest]
    below = {each.base_id for each in last}
    return next((each for each in last if each.id not in below), last[0])

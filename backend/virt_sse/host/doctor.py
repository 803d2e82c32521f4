"""Finds the faults of a host, with a remedy each; changes nothing, and opens no image."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from virt_sse.errors import VirtSseError
from virt_sse.host.checks import files, installation, keys, programs, stages
from virt_sse.host.fault import HostFault
from virt_sse.keys.host import Host
from virt_sse.model.disks import Disk

Check = Callable[[Host, Sequence[Disk]], Iterator[HostFault]]

SET_UP: tuple[Check, ...] = (
    files.permissions,
    installation.hook,
    installation.guest_library,
    files.image_folders,
)
"""Checks of files alone, for the agent's page."""
ALL: tuple[Check, ...] = (
    *SET_UP,
    files.file_systems,
    files.clock,
    installation.apparmor_rule,
    installation.units,
    keys.keyring,
    keys.host_key,
    keys.certificates,
    keys.lease,
    programs.tools,
    programs.supported_ciphers,
    programs.agent,
    programs.denials,
    stages.user_ids,
    stages.leftovers,
)


def examine(host: Host) -> list[HostFault]:
    """Find all faults. A part of the host that cannot be examined is a finding, too."""
    disks: list[Disk] = []
    found: list[HostFault] = []
    with _noting(found, "store-unreadable", "store", "restore or upgrade the store"):
        disks = host.store.all()
    return [*found, *_run(ALL, host, disks)]


def examine_set_up(host: Host, disks: Sequence[Disk]) -> list[HostFault]:
    """Find the faults that files alone tell.

    :param disks: all disks of the store.
    """
    return list(_run(SET_UP, host, disks))


def _run(checks: Sequence[Check], host: Host, disks: Sequence[Disk]) -> Iterator[HostFault]:
    for check in checks:
        found: list[HostFault] = []
        part = check.__name__.replace("_", " ")
        with _noting(found, "not-examined", part, "remove the cause, then run 'virt-sse host doctor' again"):
            found += check(host, disks)
        yield from found


@contextlib.contextmanager
def _noting(found: list[HostFault], finding_id: str, part: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (VirtSseError, OSError) as exc:
        hint = exc.hint if isinstance(exc, VirtSseError) else None
        found.append(HostFault(finding_id, part, str(exc), hint or remedy))

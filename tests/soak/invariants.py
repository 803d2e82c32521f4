"""What holds after every kill."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from soak.sites import PATTERN, FileSite
from virt_sse.audit.log import AuditLog
from virt_sse.backend import Backend
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import DiskState
from virt_sse.model.keys import KeyState
from virt_sse.qemu import envelope_slots, image_file

_TEMPORARY = re.compile(r"^\..+|.*\.(partial|erased|new)$")
"""Names of unfinished files; the product's own begin with a dot."""


_IN_IMAGES = (DiskKind.DISK, DiskKind.SNAPSHOT, DiskKind.IMAGE)
"""The kinds whose files are in the folder of images; restore points are elsewhere."""


def check_host(site: FileSite, disks: Mapping[str, bytes], *, optional: Collection[str] = ()) -> set[str]:
    """Let the next command recover, then check the host.

    :param disks: the expected content, by disk name: the beginning of the disk; the rest is empty.
    :param optional: disks that may be missing.
    :return: the names of the disks found.
    """
    site.await_quiet()
    with Backend.open(site.root) as backend:
        found = {disk.name: disk for kind in _IN_IMAGES for disk in backend.disks.all(kind)}
        assert set(disks) - set(optional) <= set(found) <= set(disks), f"disks {sorted(found)}"
        assert {path.name for path in site.images.iterdir()} == {disk.path.name for disk in found.values()}
        for name, disk in found.items():
            assert disk.state is DiskState.READY, f"{name} is {disk.state}"
            assert disk.path.stat().st_uid == 0
            backend.disks.check(name)
            with image_file.opened(disk.path) as descriptor:
                assert envelope_slots.read(descriptor, disk.format) == disk.envelope
            for entry in disk.deks:
                backend.host.keys.unwrap_slot(disk, entry.slot)
            plain = site.folder / "plain"
            plain.unlink(missing_ok=True)
            backend.transfer.export(name, plain, destination_format="raw")
            data = plain.read_bytes()
            plain.unlink()
            assert len(data) == disk.size
            expected = disks[name][: len(data)]
            assert data.startswith(expected), f"content of {name}"
            if disk.format is DiskFormat.QCOW2:  # unwritten sectors of a raw image decrypt to random bytes
                assert not data[len(expected) :].strip(b"\0"), f"content of {name}, behind {len(expected)}"
        assert all(use.state is KeyState.ENABLED for use in backend.keys.in_use())
        assert not backend.keys._pending.all(), "an envelope is still to be written"
        log = AuditLog(site.root / "var/log/virt-sse/audit.jsonl", key=site.state / "audit.key")
        if log.path.exists():
            assert log.verify().broken is None, log.verify().broken
    check_plaintext(site)
    return set(found)


def check_plaintext(site: FileSite) -> None:
    """Check that no file of the host has plaintext."""
    for path in site.root.rglob("*"):
        if path.is_file():
            assert PATTERN not in path.read_bytes(), f"plaintext in {path}"


def check_files(site: FileSite) -> None:
    """Check that no unfinished file is left once the command has been repeated."""
    for path in (*site.root.rglob("*"), *site.out.rglob("*")):
        assert not _TEMPORARY.match(path.name), f"{path} is left"


def is_whole_database(path: Path) -> bool:
    """Whether a backup is absent (false) or a whole SQLite file (true); anything else fails."""
    import sqlite3
    from contextlib import closing

    if not path.exists():
        return False
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    return True

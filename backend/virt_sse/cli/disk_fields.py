"""How commands print disks and copies of disks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from virt_sse.cli.output import OutputFormat, human_size, note, print_fields, print_json, print_rows
from virt_sse.cli.session import all_disks
from virt_sse.errors import InvalidValueError
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disk_lines import owners
from virt_sse.model.disks import Disk, StoragePool

if TYPE_CHECKING:
    from virt_sse.disks.copies import Copied
    from virt_sse.keys.host import Host


def image_place(path: Path | None, pool: str | None) -> Path | StoragePool | None:
    """The place chosen by the options ``--path`` and ``--pool``.

    :raise InvalidValueError: When both are given.
    """
    if path and pool:
        raise InvalidValueError("--path and --pool exclude each other")
    return path or (StoragePool(pool) if pool else None)


def print_disk(disk: Disk, output: OutputFormat) -> None:
    """Print a disk, or a copy."""
    print_fields(disk_fields(disk) | {"size": shown_size(disk, output)}, output)


def print_copies(kind: DiskKind, disk: str | None, output: OutputFormat) -> None:
    """Print the copies of a kind as stored.

    :param disk: name or id of the disk whose copies are printed; default: of all disks.
    """
    every = all_disks()
    owner, names = owners(every), {each.id: each.name for each in every}
    rows = []
    for copy in every:
        of = owner.get(copy.id)
        if copy.kind is kind and disk in (None, str(copy.source_id), *((str(of.id), of.name) if of else ())):
            base = names.get(copy.base_id, str(copy.base_id)) if copy.base_id else None
            shown = {"size": shown_size(copy, output), "disk": of.name if of else None, "based-on": base}
            rows.append(disk_fields(copy) | shown)
    print_rows(rows, ("name", "disk", "created", "size", "based-on", "state", "key", "path"), output)


def print_snapshots(taken: Copied, output: OutputFormat) -> None:
    """Print snapshots just taken, and how."""
    if output is OutputFormat.JSON:
        print_json(
            {
                "snapshots": [disk_fields(each) | _manner(taken, each) for each in taken.disks],
                "domain": taken.domain,
                "seconds": round(taken.seconds, 3),
                "pause-seconds": round(taken.pause_seconds, 3),
            }
        )
        return
    for each in taken.disks:
        note(f"snapshot {each.name} ({shown_size(each, output)}, {each.path})")
        if increment := taken.increments.get(each.id):
            how = "a dirty bitmap" if increment.by_bitmap else "a comparison: no dirty bitmap is valid"
            changed = human_size(increment.changed_bytes)
            note(f"  {changed} changed since {increment.base.name}, found by {how}")
        elif reason := taken.full.get(each.name):
            note(f"  a full copy: {reason}")
    if taken.domain is not None:
        note(f"domain {taken.domain} was paused for {1000 * taken.pause_seconds:.0f} ms")


def print_backup(made: Copied, output: OutputFormat) -> None:
    """Print a restore point just made, and how."""
    (point,) = made.disks
    print_fields(disk_fields(point) | {"size": shown_size(point, output)} | _manner(made, point), output)


def _manner(copied: Copied, copy: Disk) -> dict[str, object]:
    increment = copied.increments.get(copy.id)
    if increment is None:
        return {"manner": "full", "reason": copied.full.get(copy.name)}
    return {
        "manner": "bitmap" if increment.by_bitmap else "comparison",
        "changed-bytes": increment.changed_bytes,
    }


def shown_size(disk: Disk, output: OutputFormat) -> int | str:
    """The size: in bytes in JSON, with a unit in a table."""
    return disk.size if output is OutputFormat.JSON else human_size(disk.size)


def disk_fields(disk: Disk) -> dict[str, object]:
    """The fields of a disk, or of a copy."""
    fields: dict[str, object] = {
        "name": disk.name,
        "id": str(disk.id),
        "state": disk.state.value,
        "size": disk.size,
        "format": disk.format.value,
        "path": str(disk.path),
        "sku": disk.sku.value,
        "caching": disk.caching.value,
        "encryption-type": disk.encryption_type.value,
        "encryption-set": str(disk.set_id) if disk.set_id else None,
        "key": str(disk.key) if disk.deks else None,
        "created": disk.created.isoformat(),
    }
    if disk.kind is not DiskKind.DISK:
        del fields["sku"], fields["caching"]
    if disk.source_id:
        fields["source"] = str(disk.source_id)
    if disk.base_id:
        fields["base"] = str(disk.base_id)
    if disk.deleted:
        fields["deleted"] = disk.deleted.isoformat()
    if disk.scheduled_purge:
        fields["scheduled-purge"] = disk.scheduled_purge.isoformat()
    if disk.point:
        fields["point"] = str(disk.point)
    return fields


def shown_fields(disk: Disk, output: OutputFormat, *, is_missing: bool) -> dict[str, object]:
    """The fields of a disk as printed.

    :param is_missing: whether the disk has no image.
    """
    from virt_sse.disks.missing_images import MISSING

    state = MISSING if is_missing else disk.state.value
    return disk_fields(disk) | {"size": shown_size(disk, output), "state": state}


def dek_fields(host: Host, disk: Disk) -> list[dict[str, object]]:
    """The DEKs of a disk, or of a copy, with the states of their keys."""
    states = host.keys.key_states(disk)
    return [
        {
            "slot": entry.slot,
            "cipher": str(entry.cipher),
            "key": str(entry.wrapped.key),
            "algorithm": entry.wrapped.algorithm,
            "key-state": states[entry.wrapped.key].value,
        }
        for entry in disk.deks
    ]

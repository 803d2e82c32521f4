"""Act four, the life of a disk: encrypted and re-encrypted while in use, backed up, lost, restored."""

from __future__ import annotations

import json
from pathlib import Path

from guest_scripts import VERIFY, WRITE
from stage import Stage, heading, quote
from virt_sse.errors import LabError
from virt_sse.lab import acceleration, recipes
from virt_sse.lab.guests import Guest, disk_xml

_IN_EACH_FILE = b"\n19998\n19999\n20000\n"


def play(stage: Stage) -> None:
    """Play the act.

    :raise LabError: On an unexpected result.
    """
    linux, micro = acceleration.probe("linux-micro"), recipes.linux_micro()
    heading("A guest writes to a plaintext disk")
    plain = stage.host.images / "old.raw"
    with plain.open("wb") as file:
        file.truncate(64 << 20)
    guest = Guest(stage.host, "old", acceleration=linux, boot=micro, disks=[disk_xml(plain)])
    guest.define(WRITE)
    stage.virsh("start", "old")
    guest.wait_for("writing")

    heading("The disk is encrypted in place, then re-encrypted with two layers; the guest goes on writing")
    stage.virt_sse("vm", "encrypt", "old")
    stage.virt_sse("disk", "reencrypt", "old-vda", "--des", "vital")
    stage.virt_sse("vm", "verify", "old")
    quote(guest.wait_for("files").splitlines()[-1])

    heading("A snapshot of the running guest's disk, and a backup elsewhere")
    stage.virt_sse("snapshot", "create", "before", "--disk", "old-vda")
    folder = stage.host.directory / "backups"
    folder.mkdir()
    made = stage.virt_sse("disk", "backup", "old-vda", folder, "--output", "json")
    _see_files_in(stage, {plain})
    stage.virt_sse("vm", "encrypt", "old", "--wipe")
    _see_files_in(stage, set())

    heading("The disk and its snapshot are lost; the backup has all files")
    stage.virsh("destroy", "old")
    stage.virsh("undefine", "old")
    stage.virt_sse("disk", "delete", "old-vda", "--purge")
    stage.virt_sse("snapshot", "delete", "before")
    stage.virt_sse("disk", "restore", json.loads(made)["name"], "again", *stage.at("again"))
    element = stage.run("virt-sse", "disk", "xml", "again")
    again = Guest(stage.host, "again", acceleration=linux, boot=micro, disks=[element])
    again.define(VERIFY)
    stage.virsh("start", "again")
    said = again.wait_shutoff()
    quote(said)
    if "verified 25 files" not in said or "linux-micro: exit 0" not in said:
        raise LabError("the restored disk does not have the guest's files")
    stage.see_no_secret()


def _see_files_in(stage: Stage, expected: set[Path]) -> None:
    """Search all images and backups for the content of the guest's files."""
    folders = (stage.host.images, stage.host.directory / "backups")
    paths = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    found = {path for path in paths if _IN_EACH_FILE in path.read_bytes()}
    if found != expected:
        raise LabError(f"the guest's files are in {sorted(found)}, not in {sorted(expected)}")
    quote(
        f"{len(paths)} images and manifests searched: the files are in {', '.join(map(str, found)) or 'none'}"
    )

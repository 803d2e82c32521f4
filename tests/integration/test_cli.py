"""``virt-sse`` as a user meets it, with good input and bad. Needs no libvirt."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import images
from support.command_line import PROGRAM, CommandLine

M = 1 << 20


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A host with one disk, called ``disk``."""
    images.require("qemu-img", "qemu-io", "cryptsetup")
    root = tmp_path_factory.mktemp("host")
    (root / "var/lib/libvirt/images").mkdir(parents=True)
    host = CommandLine(root)
    host("host", "init")
    host("disk", "create", "disk", "--size", "1M")
    return host


LONG = "x" * 10_000
NEW = ("disk", "create", "new", "-s", "1M", "--path")
EXPORT = ("disk", "export", "disk", "--plaintext")

BAD_INPUT = {
    "unknown disk": (("disk", "show", "other"), "no disk 'other'", 1),
    "unknown disk, checked": (("disk", "check", "other"), "no disk 'other'", 1),
    "unknown disk, resized": (("disk", "resize", "other", "2M"), "no disk 'other'", 1),
    "unknown disk, deleted": (("disk", "delete", "other"), "no disk 'other'", 1),
    "unknown disk, in XML": (("disk", "xml", "other"), "no disk 'other'", 1),
    "name that is not UTF-8": (("disk", "show", b"\xff"), r"no disk '\udcff'", 1),
    "name taken": (("disk", "create", "disk", "-s", "1M", "--path", "other"), "name 'disk' exists", 1),
    "path taken": ((*NEW, "/dev/null"), "/dev/null exists", 1),
    "path is a folder": ((*NEW, "/"), "/ exists", 1),
    "path below no folder": ((*NEW, "/dev/null/x"), "not a folder", 1),
    "path in no folder": ((*NEW, "/nowhere/x"), "not a folder", 1),
    "path too long": ((*NEW, LONG), "File name too long", 1),
    "parent too long": ((*NEW, f"{LONG}/x"), "not a folder", 1),
    "path that is not UTF-8": ((*NEW, b"\xff"), "invalid image path", 2),
    "path of two lines": ((*NEW, "a\nb"), "invalid image path", 2),
    "size 0": (("disk", "create", "new", "-s", "0"), "invalid size '0'", 2),
    "size negative": (("disk", "create", "new", "-s", "-1G"), "invalid size '-1G'", 2),
    "size 10X": (("disk", "create", "new", "-s", "10X"), "invalid size '10X'", 2),
    "size 513": (("disk", "create", "new", "-s", "513"), "cannot have 513 bytes", 2),
    "size huge": (("disk", "create", "new", "-s", "9" * 20 + "T"), "below 8 EiB", 2),
    "size beyond the largest": (("disk", "create", "new", "-s", "65T"), "cannot have", 2),
    "new size": (("disk", "resize", "disk", "1"), "cannot have 1 bytes", 2),
    "smaller size": (("disk", "resize", "disk", "512K"), "more than 524288", 2),
    "name with a slash": (("disk", "create", "a/b", "-s", "1M"), "invalid disk name 'a/b'", 2),
    "name with dots": (("disk", "create", "..", "-s", "1M"), "invalid disk name '..'", 2),
    "name with a dash": (("disk", "create", "-s", "1M", "--", "-x"), "invalid disk name '-x'", 2),
    "name with a newline": (("disk", "create", "a\nb", "-s", "1M"), r"invalid disk name 'a\nb'", 2),
    "empty name": (("disk", "create", "", "-s", "1M"), "invalid disk name ''", 2),
    "name of 10 kB": (("disk", "create", LONG, "-s", "1M"), "invalid disk name", 2),
    "export without a word": (("disk", "export", "disk", "out"), "not encrypted", 1),
    "export to a taken path": ((*EXPORT, "/dev/null"), "exists already", 1),
    "export to no folder": ((*EXPORT, "/nowhere/x"), "cannot write", 1),
    "export as nonsense": ((*EXPORT, "out", "--format", "x"), "format 'x'", 1),
    "import of nothing": (("disk", "import", "new", "/nowhere"), "cannot read /nowhere", 1),
    "import of a folder": (("disk", "import", "new", "/"), "neither a file nor a block device", 1),
    "import of a device": (("disk", "import", "new", "/dev/zero"), "neither a file nor a block device", 1),
    "import of an endless name": (("disk", "import", "new", LONG), "cannot read", 1),
    "adoption of nothing": (("disk", "adopt", "/nowhere"), "/nowhere is missing", 1),
    "adoption of a folder": (("disk", "adopt", "/"), "not a regular file", 1),
    "no target": (("disk", "xml", "disk", "--target", "x"), "invalid target 'x'", 2),
    "no libvirt to attach": (("disk", "attach", "disk", "domain"), "libvirt does not answer", 1),
    "no libvirt to delete": (("disk", "delete", "disk"), "libvirt does not answer", 1),
    "no libvirt for a pool": (("disk", "create", "x", "-s", "1M", "--pool", "p"), "not answer", 1),
}  # fmt: skip


@pytest.mark.slow
def test_bad_input_is_one_error_line_and_leaves_nothing(
    host: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(host.root)
    before = images.files_below(host.root)

    def attempt(case: str) -> None:
        arguments, reason, status = BAD_INPUT[case]
        assert reason in host.refuses(*arguments, status=status), case

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(attempt, BAD_INPUT))
    assert images.files_below(host.root) == before


@pytest.mark.parametrize(
    "arguments", [["disk", "create"], ["disk", "make"], ["disk", "show", "a", "--output", "x"]]
)
def test_wrong_usage_is_status_2(host: CommandLine, arguments: list[str]) -> None:
    host(*arguments, status=2)


@pytest.mark.slow
def test_an_import_refuses_unsuitable_sources(host: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file" in host.refuses("disk", "import", "new", tmp_path / "pipe")
    assert "not a regular file" in host.refuses("disk", "adopt", tmp_path / "pipe")
    assert "0 bytes" in host.refuses("disk", "import", "new", tmp_path / "empty", status=2)
    plain = images.make_plain(tmp_path / "plain", "qcow2", bytes(M))
    assert "invalid VMDK" in host.refuses("disk", "import", "new", plain, "--source-format", "vmdk")
    whole = plain.read_bytes()
    plain.write_bytes(whole[:60])
    assert "qemu-img: " in host.refuses("disk", "import", "new", plain)
    plain.write_bytes(whole)
    encrypted = host.root / "var/lib/libvirt/images/disk.qcow2"
    assert "is itself encrypted" in host.refuses("disk", "import", "new", encrypted)
    assert [row["name"] for row in json.loads(host("disk", "list", "-o", "json"))] == ["disk"]


@pytest.mark.slow
def test_an_image_that_draws_on_other_files_is_read_only_when_asked(
    host: CommandLine, tmp_path: Path
) -> None:
    """Else an image from anywhere could bring any file of this host into a disk."""
    secret = images.make_plain(tmp_path / "secret", "raw", b"\x53" * M)
    backed, data, flat = (tmp_path / name for name in ("backed", "data", "flat.vmdk"))
    create = ["qemu-img", "create", "-q", "-f", "qcow2"]
    subprocess.run([*create, "-b", secret, "-F", "raw", backed], check=True)
    subprocess.run(
        [*create, "-o", f"data_file={tmp_path / 'its-data'},data_file_raw=on", data, "1M"], check=True
    )
    shutil.copy(secret, tmp_path / "its-data")
    flat.write_text(
        "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
        f'createType="monolithicFlat"\nRW {M // 512} FLAT "{secret}" 0\nddb.adapterType = "ide"\n'
    )
    for source in (backed, data, flat):
        message = host.refuses("disk", "import", "new", source)
        assert "refers to another file" in message
        assert "--with-backing" in message
    host("disk", "import", "backed", backed, "--with-backing")
    out = tmp_path / "out"
    host("disk", "export", "backed", out, "--plaintext", "--format", "raw")
    assert out.read_bytes() == secret.read_bytes()


@pytest.mark.slow
def test_a_damaged_envelope_or_header_is_reported(host: CommandLine, tmp_path: Path) -> None:
    whole = (host.root / "var/lib/libvirt/images/disk.qcow2").read_bytes()
    start = whole.index(b"LUKS\xba\xbe")
    damaged = tmp_path / "damaged.qcow2"
    both_slots_changed = bytearray(whole)
    for slot in (start + 1024, start + 2560):
        both_slots_changed[slot + 100 : slot + 200] = bytes(100)
    for content, reason in (
        (whole[: start + 1100], "outside of the file"),
        (both_slots_changed, "envelope is damaged"),
        (whole[: start + 1024] + b"virt-sse\0\x63" * 300 + whole[start + 4024 :], "version 99"),
        (whole[: start + 1024] + bytes(3072) + whole[start + 4096 :], "no envelope"),
        (whole[:start] + b"SKUL" + whole[start + 4 :], "no LUKS header"),
        (whole[:200], "damaged header extensions"),
        (whole[:50], "not a qcow2 image"),
        (b"", "no LUKS header"),
    ):
        damaged.write_bytes(content)
        assert reason in host.refuses("disk", "adopt", damaged)


@pytest.mark.slow
def test_the_keyring_of_another_host_opens_no_disk(
    root: Path, virt_sse: CommandLine, host: CommandLine
) -> None:
    virt_sse("host", "init")
    virt_sse("disk", "create", "disk", "-s", "1M")
    keyring = root / "var/lib/virt-sse/platform-managed"
    aside = keyring.with_name("aside")
    keyring.rename(aside)
    for arguments in (("check", "disk"), ("create", "new", "-s", "1M")):
        assert "keyring is missing" in virt_sse.refuses("disk", *arguments)
    assert "keyring is missing" in virt_sse.refuses("host", "init")
    shutil.copytree(host.root / "var/lib/virt-sse/platform-managed", keyring)
    for arguments in (("check", "disk"), ("export", "disk", "out", "--plaintext"), ("resize", "disk", "2M")):
        assert "another host's keyring" in virt_sse.refuses("disk", *arguments)
    shown = json.loads(virt_sse("disk", "show", "disk", "-o", "json"))
    assert [dek["key-state"] for dek in shown["deks"]] == ["deleted"]
    assert images.files_below(root / "var/lib/libvirt/images") == ["disk.qcow2"]
    shutil.rmtree(keyring)
    aside.rename(keyring)
    assert virt_sse("disk", "check", "disk") == "disk disk: ok\n"


@pytest.mark.slow
def test_a_broken_store_is_reported_with_its_reason(root: Path, virt_sse: CommandLine) -> None:
    virt_sse("host", "init")
    store = root / "var/lib/virt-sse/store.sqlite"
    store.write_text("no database, just text that is longer than nothing")
    assert "cannot open the store: file is not a database" in virt_sse.refuses("disk", "list")
    store.unlink()
    store.mkdir()
    assert "cannot open the store" in virt_sse.refuses("disk", "list")


@pytest.mark.slow
def test_the_output_is_fit_for_people_and_programs(host: CommandLine) -> None:
    shown = json.loads(host("disk", "show", "disk", "--output", "json"))
    assert shown["size"] == M
    assert shown["state"] == "ready"
    assert shown["image"] == "present"
    assert shown["domains"] is None  # no libvirt answers
    (dek,) = shown["deks"]
    assert (dek["slot"], dek["cipher"], dek["algorithm"], dek["key-state"]) == (
        "service", "aes-256-xts", "A256KW", "enabled"
    )  # fmt: skip
    header, line = host("disk", "list").splitlines()[:2]
    assert header.split() == ["NAME", "SIZE", "FORMAT", "STATE", "KEY", "PATH"]
    assert len(line.split()) == 6
    assert "aes-256-xts" in host("disk", "show", shown["id"])
    assert host("disk", "check", "disk") == "disk disk: ok\n"
    assert host("host", "init") == "nothing to do\n"


@pytest.mark.slow
def test_an_unfinished_disk_does_not_stop_the_others(root: Path, virt_sse: CommandLine) -> None:
    """Neither the listing nor the hook may depend on one disk's storage."""
    virt_sse("host", "init")
    virt_sse("disk", "create", "good", "-s", "1M")
    virt_sse("disk", "create", "bad", "-s", "1M")
    disk_id = json.loads(virt_sse("disk", "show", "bad", "-o", "json"))["id"]
    obstacle = root / f"var/lib/libvirt/images/.{disk_id}.erased"
    obstacle.mkdir()
    (root / "var/lib/libvirt/images/bad.qcow2").unlink()
    with contextlib.closing(sqlite3.connect(root / "var/lib/virt-sse/store.sqlite")) as store:
        store.execute("UPDATE disks SET state = 'deleting' WHERE name = 'bad'")
        store.commit()
    states = {row["name"]: row["state"] for row in json.loads(virt_sse("disk", "list", "-o", "json"))}
    assert states == {"bad": "deleting", "good": "ready"}
    virt_sse("disk", "check", "good")
    assert "is deleting" in virt_sse.warns_and_refuses("disk", "check", "bad")
    obstacle.rmdir()
    assert [row["name"] for row in json.loads(virt_sse("disk", "list", "-o", "json"))] == ["good"]


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", PROGRAM, "--help"], capture_output=True, text=True, check=True
    )
    imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"sqlalchemy", "alembic", "cryptography", "libvirt", "xml", "rich"}
    assert done.stdout.count("\n") > 5

"""Domains on a lab host, with disks of ours: what an operator does with ``virt-sse`` and plain ``virsh``."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from support.lab_operator import Operator
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.lab.recipes import BOOT_SECTOR_TEXT, LinuxMicro

KEYRING = "var/lib/virt-sse/platform-managed"
Accelerate = Callable[..., Acceleration]


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_guest_boots_from_an_encrypted_disk_with_plain_virsh(
    operator: Operator, acceleration: Accelerate, boot_sector: Path, name: str, image_format: str
) -> None:
    element = operator.import_boot_sector(name, image_format=image_format)
    how = acceleration("boot-sector", slow_kvm=image_format == "qcow2")
    guest = Guest(operator.host, name, acceleration=how, disks=[element])
    guest.define()
    operator.virsh("start", name)
    assert "verified 8 sectors, ok" in guest.wait_shutoff()
    assert operator.secrets() == []
    operator.virsh("start", name)
    assert "start 2" in guest.wait_shutoff(), "what the first boot wrote was read by the second"
    assert BOOT_SECTOR_TEXT in boot_sector.read_bytes()
    assert BOOT_SECTOR_TEXT not in (operator.host.images / f"{name}.{image_format}").read_bytes()


def test_qemu_reports_luks_and_libvirt_has_the_secret_only_while_the_domain_runs(
    operator: Operator, acceleration: Accelerate, name: str
) -> None:
    element = operator.import_boot_sector(name, stays=True)
    kind = acceleration("boot-sector")
    guest = Guest(operator.host, name, acceleration=kind, disks=[element])
    guest.start()
    guest.wait_for("boot-sector: done")
    assert f"<domain type='{kind.domain_type}'" in operator.virsh("dumpxml", name)
    query = json.dumps({"execute": "query-named-block-nodes"})
    nodes = json.loads(operator.virsh("qemu-monitor-command", name, query))["return"]
    assert [n["image"]["format-specific"]["data"]["encrypt"]["format"] for n in nodes if n["encrypted"]] == [
        "luks"
    ]
    (secret,) = operator.secrets()
    assert f"usage='{secret}'" in operator.virsh("dumpxml", name)
    secret_uuid = operator.virsh("secret-list").split()[3]
    assert "private" in operator.virsh("secret-get-value", secret_uuid, status=1)
    operator.virsh("destroy", name)
    assert operator.secrets() == []


def test_a_linux_guest_sees_the_exact_size_and_keeps_its_files_over_a_rotation(
    operator: Operator, acceleration: Accelerate, linux_micro: LinuxMicro, name: str
) -> None:
    element = operator.create(name, "--size", "48M")
    guest = Guest(
        operator.host, name, acceleration=acceleration("linux-micro"), boot=linux_micro, disks=[element]
    )
    wrote = guest.run_script(
        "set -e; cat /sys/block/vda/size; cat /sys/block/vda/serial; echo\n"
        "mke2fs -q /dev/vda >&-; mount -t ext2 /dev/vda /mnt; seq 100000 >/mnt/numbers; md5sum </mnt/numbers"
    )
    size, serial, digest = wrote.split()[:3]
    assert int(size) * 512 == 48 << 20
    assert operator.virt_sse("disk", "show", name).replace("-", "").count(serial) >= 1
    operator.virt_sse("key", "rotate", "--provider", "platform-managed")
    assert digest in guest.run_script("set -e; mount -t ext2 /dev/vda /mnt; md5sum </mnt/numbers")


def test_a_rotation_goes_unnoticed_by_a_running_guest(
    operator: Operator, acceleration: Accelerate, linux_micro: LinuxMicro, name: str
) -> None:
    element = operator.create(name, "--size", "64M", image_format="raw")
    guest = Guest(
        operator.host, name, acceleration=acceleration("linux-micro"), boot=linux_micro, disks=[element]
    )
    guest.start(
        "set -e; mke2fs -q /dev/vda >&-; mount -t ext2 /dev/vda /mnt; echo writing\n"
        "for i in 1 2 3 4 5 6; do seq 200000 >/mnt/$i; sync; sleep 1; done\n"
        "echo 3 >/proc/sys/vm/drop_caches\n"
        "for i in 1 2 3 4 5 6; do md5sum </mnt/$i; done | sort -u | wc -l"
    )
    guest.wait_for("writing")
    for _ in range(3):
        report = json.loads(
            operator.virt_sse("key", "rotate", "--provider", "platform-managed", "--output", "json")
        )
        assert report["failed"] == []
    said = guest.wait_shutoff()
    assert "linux-micro: exit 0" in said
    assert "\n1\n" in said, "all six files are the same"
    operator.virt_sse("disk", "check", name)


def test_a_domain_is_refused_with_the_reason(operator: Operator, acceleration: Accelerate, name: str) -> None:
    element = operator.import_boot_sector(name)
    image = operator.host.images / f"{name}.qcow2"
    disk_id = json.loads(operator.virt_sse("disk", "show", name, "-o", "json"))["id"]
    kind = acceleration("boot-sector")

    def refusal(element: str) -> str:
        Guest(operator.host, name, acceleration=kind, disks=[element]).define()
        said = operator.virsh("start", name, status=1)
        assert "virt-sse: error: " in said
        assert operator.secrets() == []
        return said

    keyring = operator.host.root / KEYRING
    keyring.rename(keyring.with_name("elsewhere"))
    try:
        assert "keyring is missing" in refusal(element)
    finally:
        keyring.with_name("elsewhere").rename(keyring)
    assert "which the store does not have" in refusal(element.replace(disk_id, str(uuid.uuid4())))
    assert "unknown secret" in refusal(element.replace(disk_id, "no-uuid"))
    assert "no DEK in slot" in refusal(element.replace(":service", ":infrastructure"))
    assert "but the image" in refusal(element.replace(str(image), f"{image}.copy"))

    other = f"{name}b"
    operator.create(other, "--size", "1M")
    image.rename(f"{image}.kept")
    (operator.host.images / f"{other}.qcow2").rename(image)
    assert "image of another disk" in refusal(element)
    image.unlink()
    Path(f"{image}.kept").rename(image)

    header = image.read_bytes()
    with image.open("r+b") as file:
        file.seek(header.index(b"LUKS\xba\xbe"))
        file.write(b"X")
    assert "no LUKS header" in refusal(element)
    image.write_bytes(header)
    guest = Guest(operator.host, name, acceleration=kind, disks=[element])
    guest.start()
    assert "verified" in guest.wait_shutoff()


def test_a_domain_without_our_disks_starts_even_if_our_state_is_gone(
    operator: Operator, acceleration: Accelerate, boot_sector: Path, name: str
) -> None:
    plain = operator.host.images / f"{name}.img"
    plain.write_bytes(boot_sector.read_bytes())
    hook = operator.host.root / "etc/libvirt/hooks/qemu.d/virt-sse"
    script = hook.read_text()
    state = operator.host.root / "var/lib/virt-sse"
    state.rename(state.with_name("elsewhere"))
    hook.write_text(script.replace(str(Path(sys.executable).parent), "/nonexistent"))
    try:
        element = (
            f"<disk type='file'><driver name='qemu' type='raw'/><source file='{plain}'/>"
            f"<target dev='vda' bus='virtio'/></disk>"
        )
        guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[element])
        guest.start()
        assert "verified" in guest.wait_shutoff()
        reference = "<secret type='passphrase' usage='virt-sse:x:y'/>"
        ours = element.replace("<target", f"<encryption format='luks'>{reference}</encryption><target")
        guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[ours])
        guest.define()
        assert "/nonexistent/python" in operator.virsh("start", name, status=1)
    finally:
        hook.write_text(script)
        state.with_name("elsewhere").rename(state)


def test_libvirtd_restarts_and_the_secret_comes_back(
    operator: Operator, acceleration: Accelerate, name: str
) -> None:
    element = operator.import_boot_sector(name, stays=True)
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[element])
    guest.start()
    guest.wait_for("boot-sector: done")
    before = operator.secrets()
    operator.host.restart_libvirtd()
    assert operator.secrets() == before
    assert guest.is_active()

    keyring = operator.host.root / KEYRING
    keyring.rename(keyring.with_name("elsewhere"))
    try:
        operator.host.restart_libvirtd()
        assert guest.is_active(), "a hook that cannot restore a secret must not cost the guest"
    finally:
        keyring.with_name("elsewhere").rename(keyring)


def test_a_disk_is_plugged_into_and_unplugged_from_a_running_guest(
    operator: Operator, acceleration: Accelerate, linux_micro: LinuxMicro, name: str
) -> None:
    guest_disk = f"{name}-data"
    operator.create(guest_disk, "--size", "8M")
    guest = Guest(operator.host, name, acceleration=acceleration("linux-micro"), boot=linux_micro)
    guest.start(
        "echo ready; while [ ! -e /dev/vda ]; do sleep 0.1; done; cat /sys/block/vda/size\n"
        "echo plugged | dd of=/dev/vda bs=512 conv=sync 2>&-; sync; echo written\n"
        "while [ -e /dev/vda ]; do sleep 0.1; done; echo gone"
    )
    guest.wait_for("ready")
    assert "as vda" in operator.virt_sse("disk", "attach", guest_disk, name)
    assert len(operator.secrets()) == 1
    assert "attached to domain" in operator.virt_sse("disk", "attach", guest_disk, name, status=1)
    used = json.loads(operator.virt_sse("audit", "list", "--disk", guest_disk, "-o", "json"))
    assert used[-1]["domain"] == name, "key uses for hot-plug name the domain"
    guest.wait_for("written")
    assert f"{(8 << 20) // 512}\n" in guest.serial
    assert "attached to domain" in operator.virt_sse("disk", "delete", guest_disk, status=1)
    operator.virt_sse("disk", "detach", guest_disk, name)
    assert operator.secrets() == []
    assert "gone" in guest.wait_shutoff()
    assert "<disk" not in operator.virsh("dumpxml", name)
    assert "does not have disk" in operator.virt_sse("disk", "detach", guest_disk, name, status=1)
    exported = operator.host.directory / name
    operator.virt_sse("disk", "export", guest_disk, exported, "--format", "raw", "--plaintext")
    assert exported.read_bytes().startswith(b"plugged\n")


def test_a_disk_is_attached_to_and_detached_from_a_guest_that_is_shut_off(
    operator: Operator, acceleration: Accelerate, name: str
) -> None:
    operator.create(name, "--size", "8M")
    boots = operator.import_boot_sector(f"{name}b")
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[boots])
    guest.define()
    assert "no domain 'nowhere'" in operator.virt_sse("disk", "attach", name, "nowhere", status=1)
    assert "as vdb" in operator.virt_sse("disk", "attach", name, name)
    assert operator.secrets() == []
    assert "attached to domain" in operator.virt_sse("disk", "attach", f"{name}b", name, status=1)
    operator.virsh("start", name)
    assert "verified" in guest.wait_shutoff()
    operator.virt_sse("disk", "detach", name, name)
    assert "vdb" not in operator.virsh("dumpxml", name)
    operator.virt_sse("disk", "delete", name)
    assert f"disk '{name}' is deleted" in operator.virt_sse("disk", "attach", name, name, status=1)
    operator.virt_sse("disk", "recover", name)
    operator.virt_sse("disk", "delete", name, "--purge")
    assert not (operator.host.images / f"{name}.qcow2").exists()


def test_a_bus_that_cannot_unplug_changes_nothing(
    operator: Operator, acceleration: Accelerate, name: str
) -> None:
    operator.create(name, "--size", "8M")
    boots = operator.import_boot_sector(f"{name}b", stays=True)
    Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[boots]).define()
    assert "no name of a sata disk" in operator.virt_sse(
        "disk", "attach", name, name, "--bus", "sata", "--target", "vdb", status=2
    )
    assert "as sda" in operator.virt_sse("disk", "attach", name, name, "--bus", "sata")
    assert "<target dev='sda' bus='sata'/>" in operator.virsh("dumpxml", name)
    operator.virsh("start", name, "--paused")
    before = operator.virsh("dumpxml", name, "--inactive")
    assert "cannot be hot unplugged" in operator.virt_sse("disk", "detach", name, name, status=1)
    assert operator.virsh("dumpxml", name, "--inactive") == before
    assert len(operator.secrets()) == 2, "the running guest keeps its key"
    operator.virsh("destroy", name)
    operator.virt_sse("disk", "detach", name, name)
    assert "sda" not in operator.virsh("dumpxml", name)


def test_a_disk_without_its_image_is_listed_as_missing(operator: Operator, name: str) -> None:
    operator.create(name, "--size", "1M")
    image = operator.host.images / f"{name}.qcow2"

    def state() -> str:
        listed = json.loads(operator.virt_sse("disk", "list", "-o", "json"))
        return str(next(each["state"] for each in listed if each["name"] == name))

    assert state() == "ready"
    image.rename(f"{image}.kept")
    assert state() == "missing"
    assert json.loads(operator.virt_sse("disk", "show", name, "-o", "json"))["state"] == "missing"
    Path(f"{image}.kept").rename(image)
    assert state() == "ready"


@pytest.mark.parametrize("image_format", ["qcow2", "raw"])
def test_a_running_guest_sees_its_disk_grow(
    operator: Operator, acceleration: Accelerate, linux_micro: LinuxMicro, name: str, image_format: str
) -> None:
    element = operator.create(name, "--size", "8M", image_format=image_format)
    guest = Guest(
        operator.host, name, acceleration=acceleration("linux-micro"), boot=linux_micro, disks=[element]
    )
    guest.start("echo ready; until [ $(cat /sys/block/vda/size) = 40960 ]; do sleep 0.1; done; echo grown")
    guest.wait_for("ready")
    operator.virt_sse("disk", "resize", name, "20M")
    guest.wait_for("grown", timeout=20)
    guest.wait_shutoff()
    assert json.loads(operator.virt_sse("disk", "show", name, "-o", "json"))["size"] == 20 << 20


def test_disks_in_use_are_not_exported_or_deleted(
    operator: Operator, acceleration: Accelerate, name: str
) -> None:
    element = operator.import_boot_sector(name, stays=True)
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[element])
    guest.start()
    guest.wait_for("boot-sector: done")
    for command in (["export", name, str(operator.host.directory / "out"), "--plaintext"], ["check", name]):
        assert "in use by a running domain" in operator.virt_sse("disk", *command, status=1)
    assert "attached to domain" in operator.virt_sse("disk", "delete", name, status=1)
    assert "attached to domain" in operator.virt_sse("disk", "delete", "--dry-run", name, status=1)
    guest.destroy()
    operator.virt_sse("disk", "check", name)


def test_a_disk_moves_into_an_encryption_set_while_its_domain_runs(
    operator: Operator, acceleration: Accelerate, name: str
) -> None:
    element = operator.import_boot_sector(name, stays=True)
    operator.virt_sse("des", "create", name, "--provider", "platform-managed", "--key", "default")
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[element])
    guest.start()
    guest.wait_for("boot-sector: done")
    moved = json.loads(operator.virt_sse("disk", "update", name, "--des", name, "-o", "json"))
    assert moved["encryption-type"] == "EncryptionAtRestWithCustomerKey"
    assert guest.is_active()
    guest.destroy()
    operator.virt_sse("disk", "check", name)
    guest.start()
    assert "start 2" in guest.wait_for("boot-sector: done")
    guest.destroy()


def test_a_disk_in_a_storage_pool_is_served(operator: Operator, name: str) -> None:
    folder = operator.host.directory / "pool"
    folder.mkdir(exist_ok=True)
    operator.virsh("pool-create-as", name, "dir", "--target", folder)
    operator.virt_sse("disk", "create", name, "--size", "4M", "--pool", name)
    assert f"{name}.qcow2" in operator.virsh("vol-list", name)
    assert "no storage pool" in operator.virt_sse(
        "disk", "create", "x", "-s", "1M", "--pool", "nope", status=2
    )
    operator.virsh("pool-destroy", name)


def test_a_lost_store_is_rebuilt_from_an_image(
    operator: Operator, acceleration: Accelerate, name: str
) -> None:
    element = operator.import_boot_sector(name)
    state = operator.host.root / "var/lib/virt-sse"
    for file in state.glob("store.sqlite*"):
        file.unlink()
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[element])
    guest.define()
    assert "disk adopt" in operator.virsh("start", name, status=1)
    operator.virt_sse("disk", "adopt", operator.host.images / f"{name}.qcow2")
    operator.virsh("start", name)
    assert "verified" in guest.wait_shutoff()


@pytest.mark.parametrize("boundary", ["start", "stop"])
def test_an_image_put_back_is_refused_until_trusted(
    operator: Operator, acceleration: Accelerate, name: str, boundary: str
) -> None:
    element = operator.import_boot_sector(name, stays=True)
    image = operator.host.images / f"{name}.qcow2"
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[element])
    older = image.read_bytes()
    guest.start()
    guest.wait_for("boot-sector: done")
    if boundary == "stop":
        older = image.read_bytes()
    operator.virsh("destroy", name)
    newest = image.read_bytes()
    image.write_bytes(older)
    refused = operator.virsh("start", name, status=1)
    assert "an older copy of the image" in refused
    assert f"virt-sse disk trust {name}" in refused
    assert "an older copy of the image" in operator.virt_sse("vm", "verify", name, status=1)
    image.write_bytes(newest)
    operator.virt_sse("vm", "verify", name)
    operator.virsh("start", name)
    operator.virsh("destroy", name)
    image.write_bytes(older)
    operator.virt_sse("disk", "trust", name)
    operator.virsh("start", name)
    operator.virsh("destroy", name)
    assert operator.secrets() == []

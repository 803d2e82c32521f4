"""Encryption by guests themselves: found on their disks, also while they run, and not allowed everywhere."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from support.customer_keys import RIGHTS, CustomerKeys
from support.guest_disks import GuestDisk, K, M, bitlocker, gpt, luks_format
from support.lab_operator import Operator
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains.settings import VmChanges
from virt_sse.errors import ImageError, KeyringError, PolicyError, ToolError
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest, disk_xml
from virt_sse.lab.recipes import LinuxMicro, boot_sector_image
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import NewDisk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import reading
from virt_sse.vault_client.permissions import Role

Accelerate = Callable[[str], Acceleration]
FORMATS = tuple(DiskFormat)


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-storage-daemon", "qemu-img", "cryptsetup")


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw image with BitLocker and LUKS2 in partitions, and a file system without."""
    folder = tmp_path_factory.mktemp("encrypted")
    disk = GuestDisk(64 * M)
    gpt(disk, [(2048, 4095), (8192, 16383), (40960, 81919)])
    disk.write(8192 * 512, bitlocker())
    disk.write(40960 * 512, luks_format(folder / "luks", 2)[: 64 * K])
    return disk.save(folder / "encrypted.raw")


FOUND = [
    {"partition": "gpt-2", "offset": 4 * M, "size": 4 * M, "encryption": "BitLocker"},
    {"partition": "gpt-3", "offset": 20 * M, "size": 20 * M, "encryption": "LUKS2"},
]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.raw"
    with path.open("wb") as file:
        file.truncate(8 * M)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("image_format", FORMATS)
def test_inspection_finds_encryption_on_a_disk(
    backend: Backend, virt_sse: CommandLine, encrypted: Path, image_format: DiskFormat
) -> None:
    backend.transfer.import_image(NewDisk(name="one", format=image_format), encrypted)
    assert json.loads(virt_sse("disk", "inspect", "one", "-o", "json"))["findings"] == FOUND
    backend.disks.create(NewDisk(name="two", size=M, format=image_format))
    assert backend.inspector.disk(backend.disks.get("two")) == []
    one, two = backend.disks.get("one"), backend.disks.get("two")
    with (
        pytest.raises(ToolError, match=r"^qemu-storage-daemon: .*nvalid password"),
        reading.plaintext(one.path, image_format, backend.host.keys.unwrap_all(two)),
    ):
        pass


@pytest.mark.slow
def test_inspection_prints_a_table(backend: Backend, virt_sse: CommandLine, encrypted: Path) -> None:
    backend.transfer.import_image(NewDisk(name="one"), encrypted)
    lines = virt_sse("disk", "inspect", "one").splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["gpt-2", "4M", "4M", "BitLocker"],
        ["gpt-3", "20M", "20M", "LUKS2"],
    ]
    backend.disks.create(NewDisk(name="two", size=M))
    assert virt_sse("disk", "inspect", "two").split()[-5:] == ["-", "-", "-", "none", "found"]


def test_the_plaintext_is_read_at_any_offset(backend: Backend, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    source = tmp_path / "source.raw"
    source.write_bytes(content)
    for image_format in FORMATS:
        disk = backend.transfer.import_image(
            NewDisk(name=image_format.value, format=image_format), source, source_format="raw"
        )
        with reading.plaintext(disk.path, disk.format, backend.host.keys.unwrap_all(disk)) as reader:
            assert reader.size == len(content)
            for offset, length in ((0, 1), (0, M), (511, 2), (4095, 5000), (M - 1, 9), (M, 5), (2**70, 5)):
                assert reader.read(offset, length) == content[offset : offset + length]
    with (
        pytest.raises(ImageError, match=r"missing\.raw: No such file"),
        reading.unencrypted(tmp_path / "missing.raw", "raw"),
    ):
        pass
    with (
        pytest.raises(ToolError, match=r"^qemu-storage-daemon: .*not in qcow2 format"),
        reading.unencrypted(source, "qcow2"),
    ):
        pass


def test_an_image_in_use_is_inspected(backend: Backend, encrypted: Path) -> None:
    disk = backend.transfer.import_image(NewDisk(name="one"), encrypted)
    with images.KeyedImage.of(backend, disk).held():
        assert [finding.partition for finding in backend.inspector.disk(backend.disks.get("one"))] == [
            "gpt-2",
            "gpt-3",
        ]


@pytest.fixture(scope="module")
def keys(lab_vault: LabVault, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CustomerKeys]:
    with CustomerKeys(lab_vault, tmp_path_factory.mktemp("credentials")) as keys:
        yield keys


class Sets:
    """Makes encryption sets on a host."""

    def __init__(self, host: Backend, keys: CustomerKeys) -> None:
        self.host = host
        self.keys = keys
        path = host.host.config.operator_credential
        path.parent.mkdir(parents=True, exist_ok=True)
        keys.administration.new_credential_file(path, f"host-{uuid.uuid4()}", role=Role.IDENTITY_OPERATOR)

    def new(self, name: str, kind: EncryptionType = EncryptionType.CUSTOMER_KEY) -> EncryptionSet:
        made = self.host.sets.create(
            name, provider="customer-managed", key=self.keys.new_key(), encryption_type=kind
        )
        self.keys.administration.grant(str(made.identity), RIGHTS)
        return made


@pytest.fixture
def sets(backend: Backend, keys: CustomerKeys) -> Sets:
    return Sets(backend, keys)


@pytest.mark.parametrize("kind", [EncryptionType.CUSTOMER_KEY, EncryptionType.PLATFORM_AND_CUSTOMER_KEYS])
def test_an_encrypted_image_is_not_imported_under_a_customers_key(
    backend: Backend, sets: Sets, encrypted: Path, plain: Path, tmp_path: Path, kind: EncryptionType
) -> None:
    sets.new("web", kind)
    for image in (encrypted, images.make_plain(tmp_path / "e.qcow2", "qcow2", encrypted.read_bytes())):
        with pytest.raises(PolicyError, match=r"customer's key: .*, BitLocker \(gpt-2\), LUKS2 \(gpt-3\)"):
            backend.transfer.import_image(NewDisk(name="one", encryption_set="web"), image)
    assert backend.disks.all() == []
    for image_format in FORMATS:
        name = image_format.value
        backend.transfer.import_image(
            NewDisk(name=name, format=image_format, encryption_set="web"), plain, source_format="raw"
        )
        assert backend.inspector.disk(backend.disks.get(name)) == []


def test_an_encrypted_disk_does_not_move_under_a_customers_key(
    backend: Backend, sets: Sets, encrypted: Path, plain: Path
) -> None:
    web = sets.new("web")
    backend.transfer.import_image(NewDisk(name="one"), encrypted)
    before = backend.disks.get("one")
    with pytest.raises(PolicyError, match=r"'one' cannot be put under .*LUKS2 \(gpt-3\)"):
        backend.sets.move_disk("one", "web")
    assert backend.disks.get("one") == before
    backend.transfer.import_image(NewDisk(name="two"), plain, source_format="raw")
    moved = backend.sets.move_disk("two", "web")
    assert moved.set_id == web.id
    other = sets.new("other")
    images.make_plain(plain, "raw", encrypted.read_bytes())
    _write(backend, "two", encrypted)
    assert backend.inspector.disk(backend.disks.get("two"))
    assert backend.sets.move_disk("two", "other").set_id == other.id, "it must be able to leave a key"


def _write(backend: Backend, name: str, content: Path) -> None:
    """What the guest writes to the beginning of its disk."""
    disk = backend.disks.get(name)
    deks = backend.host.keys.unwrap_all(disk)
    image = images.KeyedImage(disk.path, disk.format.value, deks[0].passphrase)
    start = content.with_name("start")
    start.write_bytes(content.read_bytes()[: 8 * M])
    assert image.io(f"write -s {start} 0 {8 * M}").returncode == 0


def test_an_encrypted_disk_is_not_adopted_under_a_customers_key(
    backend: Backend, sets: Sets, encrypted: Path, plain: Path, root: Path
) -> None:
    sets.new("web")
    disk = backend.transfer.import_image(
        NewDisk(name="one", encryption_set="web"), plain, source_format="raw"
    )
    ours = backend.transfer.import_image(NewDisk(name="two"), encrypted)
    _write(backend, "one", encrypted)
    for each in (disk, ours):
        backend.host.store.remove(each.id)
    with pytest.raises(PolicyError, match=r"'one' cannot be under .*BitLocker \(gpt-2\)") as caught:
        backend.disks.adopt(disk.path)
    assert "enforce" in str(caught.value.hint)
    assert backend.disks.adopt(ours.path).id == ours.id
    backend.close()
    (root / "etc/virt-sse").mkdir(parents=True, exist_ok=True)
    (root / "etc/virt-sse/config.toml").write_text("[policy]\nenforce = false\n")
    with Backend.open(root) as lenient:
        assert lenient.disks.adopt(disk.path).id == disk.id


def test_a_key_that_cannot_be_used_is_no_pass_and_the_platforms_disks_cost_nothing(
    backend: Backend, sets: Sets, encrypted: Path, root: Path
) -> None:
    sets.new("web")
    backend.transfer.import_image(NewDisk(name="one"), encrypted)
    log = (backend.host.config.log_directory / "audit.jsonl").read_text()
    assert len(log.splitlines()) == 1, "wrapped, and not unwrapped to look"
    keyring = backend.host.config.key_provider("platform-managed").directory
    keyring.rename(root / "away")
    with Backend.open(root) as again:
        with pytest.raises(PolicyError, match="cannot inspect the disk for in-guest encryption"):
            again.sets.move_disk("one", "web")
        with pytest.raises(KeyringError):
            again.inspector.disk(again.disks.get("one"))


def inspected(operator: Operator, name: str, status: int = 0) -> list[dict[str, object]]:
    said = operator.virt_sse("vm", "inspect", name, "--output", "json", status=status)
    document = json.JSONDecoder().raw_decode(said[said.index("{") :])[0]
    assert document["domain"] == name
    disks: list[dict[str, object]] = document["disks"]
    return disks


def imported(operator: Operator, name: str, source: Path, image_format: str) -> str:
    path = operator.host.images / f"{name}.{image_format}"
    operator.virt_sse(
        "disk", "import", name, source, "--source-format", "raw", "--path", path, "--format", image_format
    )
    return operator.virt_sse("disk", "xml", name)


def test_the_disk_of_a_running_guest_is_inspected(
    operator: Operator, acceleration: Accelerate, name: str, tmp_path: Path
) -> None:
    """Its boot sector and what is behind it leave no room for a GPT: that is at the end of its disk."""
    disk = GuestDisk(16 * M)
    gpt(disk, [(4096, 8191)])
    disk.write(0, boot_sector_image(stays=True).read_bytes()[: 4 * K])
    disk.write(4096 * 512, luks_format(tmp_path / "luks", 2)[: 32 * K])
    source = disk.save(tmp_path / "boot.raw")
    element = imported(operator, name, source, "qcow2")
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=[element])
    guest.start()
    guest.wait_for("boot-sector: done")
    finding = {"partition": "gpt-1", "offset": 2 * M, "size": 2 * M, "encryption": "LUKS2"}
    assert inspected(operator, name) == [
        {
            "target": "vda",
            "disk": name,
            "path": str(operator.host.images / f"{name}.qcow2"),
            "findings": [finding],
            "problem": None,
        }
    ]
    assert guest.is_active()
    log = (operator.host.root / "var/log/virt-sse/audit.jsonl").read_text()
    last = json.loads(log.splitlines()[-1])
    assert (last["action"], last["domain"], last["result"]) == ("unwrap", name, "allowed")
    assert "virt-sse: error: no domain 'other'" in operator.virt_sse("vm", "inspect", "other", status=1)
    guest.destroy()
    guest_without = Guest(operator.host, f"{name}-other", acceleration=acceleration("boot-sector"))
    guest_without.define()
    at_host = VmChanges(encryption_at_host=True)
    config = Config.load(operator.host.root)
    with Backend(dataclasses.replace(config, libvirt_uri=operator.host.uri)) as backend:
        with pytest.raises(PolicyError, match=r"'t\w+' cannot have encryption at host: .* LUKS2 \(gpt-1\)"):
            backend.vms.update(name, at_host)
        guest.undefine()
        backend.vms.update(guest_without.name, at_host)
        with pytest.raises(PolicyError, match=r"'t\w+' is incompatible with encryption at host: .* LUKS2"):
            backend.hotplug.attach(name, guest_without.name)


def test_encryption_made_by_a_running_guest_is_found(
    operator: Operator, acceleration: Accelerate, name: str, linux_micro: LinuxMicro
) -> None:
    element = operator.create(name, "--size", "8M")
    guest = Guest(
        operator.host, name, acceleration=acceleration("linux-micro"), disks=[element], boot=linux_micro
    )
    header = r"'LUKS\272\276\000\001'"
    guest.start(f"printf {header} | dd of=/dev/vda conv=fsync 2>/dev/null; echo encrypted; sleep 60")
    guest.wait_for("encrypted\n")
    assert inspected(operator, name)[0]["findings"] == [
        {"partition": "disk", "offset": 0, "size": 8 * M, "encryption": "LUKS1"}
    ]
    guest.destroy()


def test_a_disk_that_is_not_ours_is_inspected_if_readable(
    operator: Operator, acceleration: Accelerate, name: str, encrypted: Path
) -> None:
    folder = operator.host.images
    raw, qcow2, overlay = (folder / f"{name}.{end}" for end in ("raw", "qcow2", "overlay"))
    raw.write_bytes(encrypted.read_bytes())
    images.make_plain(qcow2, "qcow2", encrypted.read_bytes())
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", qcow2, overlay], check=True
    )
    disks = [
        disk_xml(raw, target="vda"),
        disk_xml(qcow2, target="vdb", image_format="qcow2"),
        disk_xml(overlay, target="vdc", image_format="qcow2"),
        disk_xml(folder / "missing", target="vdd"),
        "<disk type='network' device='disk'><source protocol='nbd'><host name='localhost'/></source>"
        "<target dev='vde' bus='virtio'/></disk>",
        "<disk type='file' device='cdrom'><target dev='sda' bus='sata'/></disk>",
    ]
    guest = Guest(operator.host, name, acceleration=acceleration("boot-sector"), disks=disks)
    guest.define()
    problems = {"vdc": "refers to another file", "vdd": "cannot read|Could not open", "vde": "'network'"}
    found = inspected(operator, name, status=1)
    assert [disk["target"] for disk in found] == ["vda", "vdb", "vdc", "vdd", "vde"]
    for disk in found[:2]:
        assert (disk["disk"], disk["findings"], disk["problem"]) == (None, FOUND, None)
    for disk in found[2:]:
        assert disk["findings"] == []
        assert any(part in str(disk["problem"]) for part in problems[str(disk["target"])].split("|"))
    said = operator.virt_sse("vm", "inspect", name, status=1)
    assert "virt-sse: error: 3 of 5 disks cannot be read, vdc: the image refers to another file" in said

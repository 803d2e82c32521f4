"""Virtual machines on a lab host: encryption at host, and all that it is a promise about."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import virt_sse.domains.settings
import virt_sse.store.vms
from support.faults import crash_points, dies_at
from support.lab_operator import Operator
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains.release import release
from virt_sse.domains.settings import VmChanges, VmView
from virt_sse.errors import (
    InvalidValueError,
    LabUnavailableError,
    LibvirtError,
    PolicyError,
    VirtSseError,
    VmStateError,
)
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image
from virt_sse.lab.requirements import require
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, DiskSku, NewDisk
from virt_sse.model.layers import HostCaching
from virt_sse.store.store import Store

Accelerate = Callable[[str], Acceleration]

ON, OFF = VmChanges(encryption_at_host=True), VmChanges(encryption_at_host=False)
TPM = "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>"


class VmOperator(Operator):
    """Does what commands about VMs do, most of it in this process, which is faster."""

    def vm(self, *arguments: str, status: int = 0) -> str:
        return self.virt_sse("vm", *arguments, status=status)

    def import_boot_sector(self, name: str, *, stays: bool = False, image_format: str = "qcow2") -> str:
        """Import the guest's image as a disk: its ``<disk>`` element."""
        with self.backend() as backend:
            backend.transfer.import_image(
                NewDisk(
                    name=name,
                    format=DiskFormat(image_format),
                    place=self.host.images / f"{name}.{image_format}",
                ),
                boot_sector_image(stays=stays),
            )
            return backend.domains.disk_element(name)

    def backend(self) -> Backend:
        return Backend(dataclasses.replace(Config.load(self.host.root), libvirt_uri=self.host.uri))

    def update(self, name: str, changes: VmChanges) -> VmView:
        with self.backend() as backend:
            return backend.vms.update(name, changes)

    def refuses(self, name: str, changes: VmChanges, error: type[VirtSseError] = PolicyError) -> str:
        """What is said, hint included, of an update that is refused."""
        with pytest.raises(error) as caught:
            self.update(name, changes)
        return f"{caught.value} {caught.value.hint}"

    def show(self, name: str) -> VmView:
        with self.backend() as backend:
            return backend.vms.show(name)

    @contextlib.contextmanager
    def prepared(self, name: str) -> Iterator[Backend]:
        """What the hook does at the start of a domain, and at its end, without the domain."""
        definition = DomainDefinition.parse(self.definition(name))
        with self.backend() as backend, backend.host_encryption.prepared(definition):
            yield backend
            release(backend.host.config, definition)

    def at_rest(self, name: str) -> dict[str, str]:
        return {each.name: each.state.value for each in self.show(name).at_rest}

    def define(self, guest: Guest, *edits: tuple[str, str]) -> str:
        """Define *guest*, with replacements in its XML; the XML."""
        xml = guest.xml()
        for before, after in edits:
            assert before in xml
            xml = xml.replace(before, after)
        return self.define_xml(xml)

    def define_xml(self, xml: str) -> str:
        connection = self.host.connect()
        try:
            connection.defineXML(xml)
        finally:
            connection.close()
        return xml

    def definition(self, name: str) -> str:
        return self.virsh("dumpxml", "--inactive", "--security-info", name)

    @property
    def temp_disks(self) -> Path:
        return self.host.root / "var/lib/libvirt/images/temporary-disks"

    def tpm_files(self, name: str) -> list[Path]:
        folder = self.host.root / "var/lib/libvirt/swtpm" / self.virsh("domuuid", name).strip()
        return list(folder.glob("tpm2/*.permall"))


@pytest.fixture(scope="module")
def prepared(lab_host: LabHost) -> VmOperator:
    try:
        require("swtpm", "swtpm_setup", "nbdkit")
    except LabUnavailableError as exc:
        pytest.skip(f"{exc}; {exc.hint}")
    operator = VmOperator(lab_host)
    operator.virt_sse("host", "init")
    lab_host.restart_libvirtd()
    return operator


@pytest.fixture
def operator(prepared: VmOperator) -> Iterator[VmOperator]:
    yield prepared
    prepared.forget_domains()


def _guest(operator: VmOperator, accelerate: Accelerate, name: str) -> Guest:
    element = operator.import_boot_sector(name, stays=True)
    return Guest(operator.host, name, acceleration=accelerate("boot-sector"), disks=[element])


@dataclasses.dataclass(frozen=True)
class EncryptedVm:
    """A domain with a TPM, a cached disk and a temporary disk, and with encryption at host.

    :ivar updated: the output of the command that made these settings.
    :ivar listed: the output of ``vm list`` after it.
    """

    operator: VmOperator
    guest: Guest
    updated: str
    listed: str

    @property
    def name(self) -> str:
        return self.guest.name

    @property
    def temp_disk(self) -> Path:
        return self.operator.temp_disks / self.operator.virsh("domuuid", self.name).strip() / "disk.raw"


@pytest.fixture(scope="class")
def vm(prepared: VmOperator, acceleration: Accelerate) -> Iterator[EncryptedVm]:
    guest = _guest(prepared, acceleration, f"t{uuid.uuid4().hex[:8]}")
    prepared.define(guest, ("</devices>", f"{TPM}</devices>"))
    updated = prepared.vm(
        *("update", guest.name, "--encryption-at-host", "on", "--size", "Standard_D2s_v3"),
        *("--temp-disk-size", "8M", "--disk-caching", "vda=ReadWrite"),
    )
    listed = prepared.vm("list")
    # SeaBIOS shows the guest a disk only if the disk is in the boot order; this edit must be kept.
    vdb = "<target dev='vdb' bus='virtio'/>"
    prepared.define_xml(prepared.definition(guest.name).replace(vdb, f"{vdb}<boot order='2'/>"))
    yield EncryptedVm(prepared, guest, updated, listed)
    prepared.forget_domains()


@pytest.fixture
def running_vm(vm: EncryptedVm) -> EncryptedVm:
    if not vm.guest.is_active():
        vm.operator.virsh("start", vm.name)
        vm.guest.wait_for("boot-sector: done")
    return vm


@pytest.fixture
def stopped_vm(vm: EncryptedVm) -> EncryptedVm:
    if vm.guest.is_active():
        vm.operator.virsh("destroy", vm.name)
    return vm


class TestAnEncryptedVm:
    """Most tests leave the VM as the fixture made it; the last turns encryption at host off."""

    def test_its_settings_are_shown_and_in_the_definition(self, vm: EncryptedVm) -> None:
        assert re.search(r"encryption-at-host +on\n", vm.updated)
        assert re.search(rf"{vm.name} +shut off +on +Standard_D2s_v3 +8M +1\n", vm.listed)
        assert "dumpCore='off'" in vm.operator.definition(vm.name)

    def test_temporary_disk_and_tpm_are_encrypted_for_the_running_guest(
        self, running_vm: EncryptedVm
    ) -> None:
        operator, name = running_vm.operator, running_vm.name
        said = running_vm.guest.wait_for("boot-sector: done")
        assert said.count("verified 8 sectors, ok") == 2, said
        temp = running_vm.temp_disk
        assert temp.read_bytes().startswith(b"LUKS\xba\xbe")
        assert temp.parent.stat().st_mode & 0o777 == 0o710
        assert len(temp.read_bytes()) > 8 << 20
        assert sorted(usage.rpartition(":")[2] for usage in operator.secrets()) == ["service", "temp", "tpm"]
        (state,) = operator.tpm_files(name)
        assert state.read_bytes()[5] & 1, "swtpm says that its file is encrypted"

    def test_all_its_data_is_shown_as_encrypted_or_absent(self, running_vm: EncryptedVm) -> None:
        name = running_vm.name
        shown = running_vm.operator.vm("show", name, "-o", "json")
        document = json.loads(shown.partition("virt-sse: warning")[0])
        assert document["problem"] is None
        assert document["disks"] == [
            {
                "target": "vda",
                "name": name,
                "caching": "ReadWrite",
                "encryption-type": "EncryptionAtRestWithPlatformKey",
            }
        ]
        assert {
            "disk vda": "encrypted",
            "disk vdb": "encrypted",
            "tpm": "encrypted",
            "nvram": "absent",
            "managed-save": "absent",
            "crash-dump": "absent",
            "core-dump": "absent",
        }.items() <= {each["what"]: each["state"] for each in document["at-rest"]}.items()

    def test_a_running_vm_keeps_encryption_at_host(self, running_vm: EncryptedVm) -> None:
        operator, name = running_vm.operator, running_vm.name
        refused = operator.vm("update", name, "--encryption-at-host", "off", status=1)
        assert "runs" in refused
        assert "virsh shutdown" in refused
        operator.virsh("suspend", name)
        assert "runs" in operator.refuses(name, OFF, VmStateError)
        operator.virsh("resume", name)

    def test_a_restart_of_libvirtd_and_a_reset_keep_secrets_and_temporary_disk(
        self, running_vm: EncryptedVm
    ) -> None:
        operator, guest = running_vm.operator, running_vm.guest
        before = operator.secrets()
        operator.host.restart_libvirtd()
        assert guest.is_active()
        assert operator.secrets() == before
        said = guest.wait_for("boot-sector: done")
        operator.virsh("reset", guest.name)
        # The guest counts its boots on the temporary disk.
        (first,) = map(int, re.findall(r"disk 1: start (\d+)", said))
        guest.wait_for(f"disk 1: start {(first + 1) % (1 << 16)}\n")
        assert operator.secrets() == before

    def test_its_end_erases_secrets_and_temporary_disk_and_keeps_the_tpm(
        self, running_vm: EncryptedVm
    ) -> None:
        operator, name = running_vm.operator, running_vm.name
        (state,) = operator.tpm_files(name)
        operator.virsh("destroy", name)
        assert operator.secrets() == []
        assert list(operator.temp_disks.iterdir()) == []
        assert operator.tpm_files(name) == [state]

    def test_the_key_of_its_tpm_is_rotated_and_outlives_the_store(self, stopped_vm: EncryptedVm) -> None:
        operator, name = stopped_vm.operator, stopped_vm.name
        with operator.backend() as backend:
            old = backend.vms.show(name).tpm_key
            _, report = backend.keys.rotate(PLATFORM_KEY)
            assert not [each for each in report.failed if name in each]  # the host has others' disks, too
            assert backend.vms.show(name).tpm_key != old
            store = Store(backend.host.config.store_url)
            store.vms.remove(uuid.UUID(operator.virsh("domuuid", name).strip()))
            store.close()
        operator.virsh("start", name)  # the wrapped DEK is also stored beside the TPM's state
        operator.virsh("destroy", name)
        assert operator.show(name).tpm_key

    def test_without_encryption_at_host_the_tpm_stays_encrypted(self, stopped_vm: EncryptedVm) -> None:
        operator, name = stopped_vm.operator, stopped_vm.name
        assert "host caching" in operator.refuses(name, OFF)
        uncached = dataclasses.replace(OFF, caching={"vda": HostCaching.NONE})
        assert "temporary disk" in operator.refuses(name, uncached)
        operator.update(name, dataclasses.replace(uncached, temp_disk_size=None))
        xml = operator.definition(name)
        assert "vdb" not in xml
        assert "<encryption secret=" in xml, "without its key the guest would lose the TPM's state"
        operator.virsh("start", name)
        assert {usage.rpartition(":")[2] for usage in operator.secrets()} == {"service", "tpm"}
        operator.virsh("destroy", name)


DUMPS_ITS_CORE = ("<on_crash>destroy</on_crash>", "<on_crash>coredump-destroy</on_crash>")


def test_a_definition_that_writes_memory_to_the_host_is_refused(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    guest = _guest(operator, acceleration, name)
    assert f"no domain {name!r}" in operator.refuses(name, ON, LibvirtError)
    for edit, said in (
        (DUMPS_ITS_CORE, "crash-dump"),
        (("<memory unit", "<memory dumpCore='on' unit"), "core-dump"),
        (("<vcpu>", "<memoryBacking><source type='file'/></memoryBacking><vcpu>"), "memory at /var/lib"),
    ):
        operator.define(guest, edit)
        refused = operator.refuses(name, ON)
        assert said in refused
        assert "virsh edit" in refused


def test_a_disk_of_another_region_is_not_attached(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    operator.define(_guest(operator, acceleration, name))
    with operator.backend() as backend:
        backend.sets.create(name, provider="platform-managed", key="default")
        place = operator.host.images / f"{name}b"
        backend.disks.create(NewDisk(name=f"{name}b", size=1 << 20, encryption_set=name, place=place))
    config = dataclasses.replace(Config.load(operator.host.root), libvirt_uri=operator.host.uri)
    for moved, error in (
        (dataclasses.replace(config, region="westus2"), "have the same region"),
        (dataclasses.replace(config, subscription="other"), "cannot move from subscription"),
    ):
        with Backend(moved) as backend, pytest.raises(PolicyError, match=error):
            backend.hotplug.attach(f"{name}b", name)
    with operator.backend() as backend:
        assert backend.hotplug.attach(f"{name}b", name) == "vdb"


def test_a_size_that_encrypts_its_temporary_disk_needs_no_encryption_at_host(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    operator.define(_guest(operator, acceleration, name))
    wanted = VmChanges(size="Standard_D2ds_v5", temp_disk_size=1 << 20)
    assert operator.update(name, wanted).problem is None
    with operator.prepared(name):
        (disk,) = operator.temp_disks.glob("*/disk.raw")
        assert disk.read_bytes().startswith(b"LUKS\xba\xbe")
    assert "temporary disk" in operator.refuses(name, VmChanges(size="Standard_D2ds_v4"))


def test_host_caching_and_temporary_disks_need_encryption_at_host(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    operator.define(_guest(operator, acceleration, name))
    cached = VmChanges(caching={"vda": HostCaching.READ_ONLY})
    nowhere = dataclasses.replace(ON, caching={"vdx": HostCaching.READ_ONLY})
    assert "no disk of virt-sse" in operator.refuses(name, nowhere, InvalidValueError)
    assert "host caching" in operator.refuses(name, cached)
    assert "temporary disk" in operator.refuses(name, VmChanges(temp_disk_size=1 << 30))
    other = f"{name}b"
    operator.create(other, "--size", "1M")
    with operator.backend() as backend:
        with pytest.raises(PolicyError, match="host caching ReadWrite"):
            backend.hotplug.attach(other, name, caching=HostCaching.READ_WRITE)
        backend.vms.update(name, ON)
        assert backend.hotplug.attach(other, name, caching=HostCaching.READ_WRITE) == "vdb"
        assert backend.vms.show(name).disks["vdb"].caching is HostCaching.READ_WRITE
        assert "<source protocol='nbd'" in operator.definition(name)
        backend.hotplug.detach(other, name)
        assert backend.disks.get(other).caching is HostCaching.NONE


def test_an_encrypted_vm_edited_into_plaintext_does_not_start(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    operator.define(_guest(operator, acceleration, name))
    operator.update(name, ON)
    xml = operator.definition(name)
    operator.define_xml(xml.replace(*DUMPS_ITS_CORE))
    assert "crash-dump" in operator.virsh("start", name, status=1)
    operator.define_xml(xml.replace("</devices>", f"{TPM}</devices>"))
    assert "its tpm" in operator.virsh("start", name, status=1)
    transient = xml.replace("</disk>", "<transient/></disk>", 1)
    operator.define_xml(transient)
    assert "for <transient/>, libvirt makes an overlay" in operator.virsh("start", name, status=1)
    operator.define_xml(xml)
    operator.update(name, OFF)
    operator.define_xml(operator.definition(name).replace("</disk>", "<transient/></disk>", 1))
    assert "<transient/>" in operator.refuses(name, ON)
    assert "warning: disk vda" in operator.vm("show", name)
    assert "overlay of <transient/> is not encrypted" in operator.vm("verify", name, status=1)


def test_a_saved_state_is_reported_and_resumed(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    operator.define(_guest(operator, acceleration, name))
    operator.update(name, ON)
    operator.virsh("start", name)
    file = operator.host.directory / f"{name}.save"
    operator.virsh("save", name, file)
    operator.virsh("restore", file)
    operator.virsh("managedsave", name)
    assert operator.secrets() == []
    assert operator.at_rest(name)["managed-save"] == "plaintext"
    assert "saved state" in operator.refuses(name, OFF, VmStateError)
    assert "managed-save is in plaintext" in operator.vm("verify", name, status=1)
    operator.virsh("start", name)
    assert operator.at_rest(name)["managed-save"] == "absent"
    assert len(operator.secrets()) == 1


def test_a_transient_domain_gets_no_encryption_at_host(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    connection = operator.host.connect()
    connection.createXML(_guest(operator, acceleration, name).xml())
    connection.close()
    assert "transient" in operator.refuses(name, ON, VmStateError)
    operator.virsh("destroy", name)


def test_a_tpm_that_was_made_without_encryption_is_not_silently_replaced(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    guest = _guest(operator, acceleration, name)
    operator.define(guest, ("</devices>", f"{TPM}</devices>"))
    operator.virsh("start", name)
    guest.destroy()
    assert "made without encryption" in operator.refuses(name, ON)
    (state,) = operator.tpm_files(name)
    assert not state.read_bytes()[5] & 1
    state.parents[1].rename(state.parents[1].with_name("kept"))
    operator.update(name, ON)
    operator.virsh("start", name)
    guest.destroy()
    (state,) = operator.tpm_files(name)
    assert state.read_bytes()[5] & 1


def test_definition_and_store_must_agree(operator: VmOperator, acceleration: Accelerate, name: str) -> None:
    guest = _guest(operator, acceleration, name)
    plain = operator.define(guest)
    operator.update(name, ON)
    ours = operator.definition(name)
    operator.define_xml(plain)
    refused = operator.virsh("start", name, status=1)
    assert "says encryption-at-host is off, the store says on" in refused
    assert "--encryption-at-host off" in refused
    assert "the store says on" in str(operator.show(name).problem)
    assert "the store says on" in operator.refuses(name, VmChanges(size="Standard_D2s_v3"))
    operator.define_xml(ours)
    operator.virsh("start", name)
    guest.destroy()
    operator.define_xml(plain)
    operator.update(name, OFF)
    with operator.prepared(name):
        pass

    operator.update(name, ON)
    ours = operator.definition(name)
    guest.undefine()
    operator.define_xml(ours)
    with operator.prepared(name):
        pass
    guest.undefine()
    with operator.backend() as backend:
        assert name not in {view.name for view in backend.vms.all()}
    operator.define_xml(ours)
    with operator.prepared(name):
        pass  # a store that does not know a domain does not contradict it
    operator.define_xml(plain)
    with pytest.raises(PolicyError, match="the store says on"), operator.prepared(name):
        pass


def test_an_update_that_is_killed_is_finished_or_undone(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    operator.define(_guest(operator, acceleration, name))
    on = dataclasses.replace(ON, temp_disk_size=1 << 20, caching={"vda": HostCaching.READ_ONLY})
    off = dataclasses.replace(OFF, temp_disk_size=None, caching={"vda": HostCaching.NONE})
    operator.update(name, off)
    modules = [virt_sse.domains.settings, virt_sse.store.vms]
    points = crash_points(modules, lambda: operator.update(name, on))
    operator.update(name, off)
    outcomes = set()
    for point in points[len(points) // 4 :: 8]:
        assert dies_at(point, modules, lambda: operator.update(name, on))
        assert operator.show(name).problem is None
        xml = operator.definition(name)
        is_on = 'encryption-at-host="on"' in xml
        assert ("protocol='nbd'" in xml) is is_on
        assert ("temporary-disks" in xml) is is_on
        with operator.prepared(name) as backend:
            assert temp_disk_is_there(operator) is is_on
            assert (backend.vms.show(name).disks["vda"].caching is HostCaching.READ_ONLY) is is_on
        outcomes.add(is_on)
        operator.update(name, off)
    assert outcomes == {True, False}


def temp_disk_is_there(operator: VmOperator) -> bool:
    return operator.temp_disks.exists() and any(operator.temp_disks.iterdir())


def test_the_agent_keeps_temporary_disks_in_use_and_erases_leftovers(
    operator: VmOperator, acceleration: Accelerate, name: str
) -> None:
    guest = _guest(operator, acceleration, name)
    operator.define(guest, ("</devices>", f"{TPM}</devices>"))
    operator.update(name, dataclasses.replace(ON, temp_disk_size=1 << 20))
    config = operator.host.root / "etc/virt-sse/config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text("[agent]\npoll-seconds = 0.2\n")
    left = operator.temp_disks / str(uuid.uuid4())
    left.mkdir(parents=True)
    (left / "disk.raw").write_bytes(b"LUKS left over by a host that was killed" * 100)
    os.utime(left, (1, 1))
    try:
        with LabAgent(operator.host):
            operator.virsh("start", name)
            time.sleep(1.5)
            assert len(operator.secrets()) == 3
            assert not left.exists()
            assert len(list(operator.temp_disks.iterdir())) == 1
            guest.destroy()
            assert operator.secrets() == []
            assert list(operator.temp_disks.iterdir()) == []
    finally:
        config.unlink()


@pytest.mark.parametrize("sku", [DiskSku.STANDARD_HDD, DiskSku.ULTRA])
def test_libvirt_takes_the_driver_options_of_a_sku(
    operator: VmOperator, acceleration: Accelerate, name: str, sku: DiskSku
) -> None:
    guest = _guest(operator, acceleration, name)
    operator.define(guest)
    other = f"{name}b"
    operator.create(other, "--size", "1M", "--sku", sku.value)
    guest.start()
    with operator.backend() as backend:
        backend.hotplug.attach(other, name)
    operator.run(*operator.host.command(["virt-sse", "vm", "verify", name]))
    for xml in (operator.virsh("dumpxml", name), operator.definition(name)):
        driver = xml.partition("target dev='vdb'")[0].rpartition("<driver")[2]
        if sku is DiskSku.ULTRA:
            assert "cache='none'" in driver
            assert "io='native'" in driver
        else:
            assert "<total_iops_sec>500</total_iops_sec>" in xml
    guest.destroy()
    guest.start()

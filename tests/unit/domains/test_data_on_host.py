"""What of a guest is at rest on its host, as its definition and the host's files tell."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from virt_sse.domains.data_on_host import HostData, LibvirtFiles, State, memory_snapshot, survey
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.snapshots import SnapshotFiles
from virt_sse.model.slots import TPM_SLOT
from virt_sse.system.host_memory import QemuSettings, plain_swaps

ID = uuid.UUID("b6a1c5f2-3f4d-4a0b-9c57-0f0f5f0e7c11")
TPM = "<tpm><backend type='emulator'/></tpm>"
SECRET = SecretName(ID, TPM_SLOT).uuid
OURS = f"<tpm><backend type='emulator'><encryption secret='{SECRET}'/></backend></tpm>"


def survey_of(
    root: Path, *, devices: str = "", beside: str = "", system: str = "", memory: str = ""
) -> dict[str, HostData]:
    xml = (
        f"<domain><name>web</name><uuid>{ID}</uuid><memory {memory}>1</memory>{beside}"
        f"<os>{system}</os><devices>{devices}</devices></domain>"
    )
    return {each.name: each for each in survey(DomainDefinition.parse(xml), LibvirtFiles(root))}


def states(found: dict[str, HostData]) -> dict[str, str]:
    return {name: each.state.value for name, each in found.items() if name != "swap"}


def test_a_bare_vm_has_nothing_at_rest(tmp_path: Path) -> None:
    assert set(states(survey_of(tmp_path)).values()) == {"absent"}


def test_disks_are_reported_and_not_refused(tmp_path: Path) -> None:
    usage = SecretName(ID, "service").usage
    secret = f"<encryption format='luks'><secret type='passphrase' usage='{usage}'/></encryption>"
    found = survey_of(
        tmp_path,
        devices=f"<disk><source file='/a'>{secret}</source><target dev='vda'/></disk>"
        "<disk><source file='/b'><encryption><secret uuid='x'/></encryption></source>"
        "<target dev='vdb'/></disk>"
        "<disk device='cdrom'><source file='/c'/><target dev='sda'/></disk>"
        "<disk><source dev='/d'/><target dev='vdc'/></disk>"
        f"<disk><source protocol='nbd' name='virt-sse:{ID}'/><target dev='vdd'/></disk>"
        f"<disk><source protocol='nbd' name='{ID}'/><target dev='vde'/></disk>",
    )
    targets = ("vda", "vdb", "sda", "vdc", "vdd", "vde")
    assert [found[f"disk {target}"].state for target in targets] == [
        State.ENCRYPTED,
        State.ENCRYPTED,
        State.ABSENT,
        State.PLAINTEXT,
        State.ENCRYPTED,
        State.PLAINTEXT,
    ]
    assert found["disk vdc"].place == "/d"
    assert not any(each.is_refused for each in found.values())


@pytest.mark.parametrize(
    "disk",
    [
        "<disk><source file='/a'>{key}</source><target dev='vda'/><transient/></disk>",
        "<disk><source file='/a'>{key}</source><target dev='vda'/><transient shareBacking='yes'/></disk>",
        "<disk><source file='/o'/><backingStore type='file'><source file='/a'>{key}</source></backingStore>"
        "<target dev='vda'/></disk>",
        "<disk><source file='/p'/><backingStore><source file='/o'/><backingStore><source file='/a'/>{key}"
        "</backingStore></backingStore><target dev='vda'/></disk>",
        "<disk><source file='/o'/><backingStore type='network'><source protocol='nbd' name='virt-sse:{id}'/>"
        "</backingStore><target dev='vda'/></disk>",
    ],
)
def test_an_unencrypted_overlay_of_an_encrypted_disk_is_refused(tmp_path: Path, disk: str) -> None:
    usage = SecretName(ID, "service").usage
    key = f"<encryption format='luks'><secret type='passphrase' usage='{usage}'/></encryption>"
    found = survey_of(tmp_path, devices=disk.format(key=key, id=ID))["disk vda"]
    assert (found.state, found.is_refused, found.is_of_encrypted_disk) == (State.PLAINTEXT, True, True)
    plain = "<disk><source file='/o'/><backingStore><source file='/b'/></backingStore><target dev='vda'/>"
    foreign = survey_of(tmp_path, devices=f"{plain}<transient/></disk>")["disk vda"]
    assert (foreign.state, foreign.is_refused) == (State.PLAINTEXT, False), "as any foreign disk"


@pytest.mark.parametrize(
    ("devices", "state_file", "expected", "refused"),
    [
        ("", None, State.ABSENT, False),
        (TPM, None, State.PLAINTEXT, True),
        (OURS, None, State.ENCRYPTED, False),
        (OURS, b"\x02\x01\x00\x0a\x00\x09", State.ENCRYPTED, False),
        (OURS, b"\x02\x01\x00\x0a\x00\x00", State.PLAINTEXT, True),
        (TPM, b"\x02\x01\x00\x0a\x00\x09", State.ENCRYPTED, False),
        (OURS, b"", State.PLAINTEXT, True),
        (
            TPM.replace("/></tpm>", "><source type='dir' path='/x'/></backend></tpm>"),
            None,
            State.PLAINTEXT,
            True,
        ),
    ],
)
def test_the_state_of_a_tpm_is_found_and_refused_if_plaintext(
    tmp_path: Path, devices: str, state_file: bytes | None, expected: State, refused: bool
) -> None:
    if state_file is not None:
        path = tmp_path / "var/lib/libvirt/swtpm" / str(ID) / "tpm2/tpm2-00.permall"
        path.parent.mkdir(parents=True)
        path.write_bytes(state_file)
    tpm = survey_of(tmp_path, devices=devices)["tpm"]
    assert (tpm.state, tpm.is_refused) == (expected, refused)


def test_plaintext_by_configuration_is_refused(tmp_path: Path) -> None:
    for beside, what in (
        ("<on_crash>coredump-destroy</on_crash>", "crash-dump"),
        ("<on_crash>coredump-restart</on_crash>", "crash-dump"),
        ("<memoryBacking><source type='file'/></memoryBacking>", "memory"),
    ):
        found = survey_of(tmp_path, beside=beside)
        assert [each.name for each in found.values() if each.is_refused] == [what]
    assert not any(
        each.is_refused for each in survey_of(tmp_path, beside="<on_crash>destroy</on_crash>").values()
    )
    nvdimm = "<memory model='nvdimm'><source><path>/x</path></source></memory>"
    assert survey_of(tmp_path, devices=nvdimm)["memory"].is_refused
    assert survey_of(tmp_path, memory="dumpCore='on'")["core-dump"].is_refused

    conf = tmp_path / "etc/libvirt/qemu.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text('#dump_guest_core = 0\n  dump_guest_core=1 # x\nmemory_backing_dir = "/srv/memory"\n')
    assert survey_of(tmp_path)["core-dump"].is_refused
    assert not survey_of(tmp_path, memory="dumpCore='off'")["core-dump"].is_refused
    found = survey_of(tmp_path, beside="<memoryBacking><source type='file'/></memoryBacking>")
    assert found["memory"].place == "/srv/memory"

    saved = LibvirtFiles(tmp_path).managed_save("web")
    saved.parent.mkdir(parents=True)
    saved.touch()
    found = survey_of(tmp_path)["managed-save"]
    assert (found.is_avoidable, found.is_refused) == (True, False)


def test_plaintext_by_host_or_firmware_is_reported_and_not_refused(tmp_path: Path) -> None:
    found = survey_of(
        tmp_path,
        system="<loader type='pflash'>/ovmf</loader><nvram>/vars.fd</nvram>",
        devices="<serial type='file'><source path='/log'/></serial><console type='file'><source path='/log'/>"
        "</console><filesystem><source dir='/srv'/></filesystem>",
    )
    told = {
        name: each.place for name, each in found.items() if each.state is State.PLAINTEXT and name != "swap"
    }
    assert told == {"nvram": "/vars.fd", "console": "/log", "filesystem": "/srv"}
    assert not any(each.is_refused for each in found.values())


def test_a_missing_qemu_conf_means_libvirts_defaults(tmp_path: Path) -> None:
    assert QemuSettings.read(tmp_path / "none") == QemuSettings()


def test_plaintext_swap_is_found(tmp_path: Path) -> None:
    devices = tmp_path / "block"
    for name, file, content in (
        ("dm-0", "dm/uuid", "CRYPT-PLAIN-swap\n"),
        ("dm-1", "dm/uuid", "LVM-abc\n"),
        ("zram0", "backing_dev", "none\n"),
        ("zram1", "backing_dev", "/dev/sdb\n"),
        ("sda2", "size", "1\n"),
    ):
        (devices / name / file).parent.mkdir(parents=True)
        (devices / name / file).write_text(content)
    swaps = tmp_path / "swaps"
    names = ("/dev/dm-0", "/dev/dm-1", "/dev/zram0", "/dev/zram1", "/dev/sda2", "/swap\\040file")
    swaps.write_text(
        "Filename Type Size Used Priority\n" + "".join(f"{name} partition 1 0 -2\n" for name in names)
    )
    assert plain_swaps(swaps, devices) == ["/dev/dm-1", "/dev/zram1", "/dev/sda2", "/swap file"]
    assert plain_swaps(tmp_path / "no swaps", devices) == []
    locked = survey_of(tmp_path, beside="<memoryBacking><locked/></memoryBacking>")["swap"]
    assert locked.state is State.ABSENT


def test_an_external_memory_snapshot_is_reported_as_plaintext() -> None:
    def found_in(memory: str) -> HostData | None:
        return memory_snapshot(SnapshotFiles.parse(f"<domainsnapshot>{memory}</domainsnapshot>"))

    found = found_in("<memory snapshot='external' file='/m'/>")
    assert found
    assert (found.place, found.state, found.is_refused) == ("/m", State.PLAINTEXT, False)
    assert found_in("<memory snapshot='internal'/>") is None
    assert found_in("<memory snapshot='no'/>") is None

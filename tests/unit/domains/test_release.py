"""The end of a domain whose definition has malformed parts."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains import release as release_module
from virt_sse.domains import temp_disks
from virt_sse.domains.release import release
from virt_sse.errors import LibvirtUnavailableError, StageError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.secret_name import SecretName
from virt_sse.libvirt.users import User
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.layers import StorageNode
from virt_sse.model.slots import TEMP_SLOT
from virt_sse.model.vms import temp_disk_id
from virt_sse.stages import Stages
from virt_sse.stages.record import StageRecord

ID = uuid4()
DISK = UUID("6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1")
ME = User(os.getuid(), os.getgid())


def reference(usage: str) -> str:
    return f"<disk><source file='/a'><encryption><secret usage='{usage}'/></encryption></source></disk>"


XML = f"<domain><name>d</name><uuid>{ID}</uuid><devices>{{}}</devices></domain>"
ODD = {
    "odd secret": XML.format(reference("virt-sse:zzz") + reference(SecretName(DISK, "service").usage)),
    "beyond the limits": XML.format("<x>" * 1000 + reference(SecretName(DISK, "service").usage)),
    "no secret": XML.format(""),
}


def record(config: Config, image: Path) -> None:
    StageRecord(
        disk_id=DISK,
        domain_id=ID,
        domain="d",
        image=image,
        format=DiskFormat.RAW,
        owner=ME,
        qemu=ME,
        storage=ME,
        guest_slot="service",
        stages=(StorageNode("infrastructure"),),
    ).write(config.stage_directory / str(DISK))


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> set[SecretName]:
    found: set[SecretName] = set()
    monkeypatch.setattr(release_module, "drop_secrets", lambda _uri, names: found.update(names))
    return found


@pytest.mark.parametrize("name", ODD)
def test_the_records_and_all_sound_parts_are_released(
    backend: Backend, tmp_path: Path, dropped: set[SecretName], name: str
) -> None:
    config = backend.host.config
    record(config, tmp_path / "image")
    (config.temp_disk_directory / str(ID)).mkdir(parents=True)
    (config.temp_disk_directory / str(ID) / "boot").write_text("boot")
    release(config, DomainDefinition.salvage(ODD[name]))
    assert Stages(config).records() == []
    assert not temp_disks.exists(config, ID)
    assert dropped == {SecretName(DISK, "service"), SecretName(temp_disk_id(ID), TEMP_SLOT)}


@pytest.mark.parametrize("part", ["stages", "temporary disk", "secrets"])
def test_a_part_that_fails_stops_no_other(
    backend: Backend, tmp_path: Path, dropped: set[SecretName], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    config = backend.host.config
    record(config, tmp_path / "image")
    (config.temp_disk_directory / str(ID)).mkdir(parents=True)

    def failing(*_: object, **__: object) -> None:
        raise LibvirtUnavailableError("no") if part == "secrets" else StageError("no")

    match part:
        case "stages":
            monkeypatch.setattr(Stages, "stop", failing)
        case "temporary disk":
            monkeypatch.setattr(temp_disks, "erase", failing)
        case _:
            monkeypatch.setattr(release_module, "drop_secrets", failing)
    with pytest.raises((LibvirtUnavailableError, StageError), match="no"):
        release(config, DomainDefinition.salvage(ODD["odd secret"]))
    assert (Stages(config).records() == []) == (part != "stages")
    assert temp_disks.exists(config, ID) == (part == "temporary disk")
    assert bool(dropped) == (part != "secrets")
    monkeypatch.undo()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(release_module, "drop_secrets", lambda *_: None)
        release(config, DomainDefinition.salvage(ODD["odd secret"]))

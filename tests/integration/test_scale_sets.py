"""Scale sets on a lab host: domains from one definition and one disk."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from support.faults import crash_points, dies_at
from support.lab_operator import Operator
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains import scale_sets
from virt_sse.errors import (
    DiskExistsError,
    DiskNotFoundError,
    ImageError,
    InvalidValueError,
    ScaleSetExistsError,
    ScaleSetNotFoundError,
    VmStateError,
)
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.guests import Guest
from virt_sse.model.disks import NewDisk
from virt_sse.store import scale_sets as stored

M = 1 << 20
KILLS = 8


@pytest.fixture
def template(operator: Operator, acceleration: Callable[[str], Acceleration], tmp_path: Path) -> Path:
    """A definition without disks, and without the serial port, whose log only one domain can open."""
    path = tmp_path / "template.xml"
    xml = Guest(operator.host, "template", acceleration=acceleration("boot-sector"), disks=[]).xml()
    path.write_text(re.sub("<serial.*</serial>", "", xml))
    return path


@pytest.fixture
def image(operator: Operator, name: str) -> str:
    """A disk to be copied."""
    with opened(operator) as backend:
        place = operator.host.images / f"{name}i.qcow2"
        return backend.disks.create(NewDisk(name=f"{name}i", size=M, place=place)).name


def opened(operator: Operator) -> Backend:
    host = operator.host
    return Backend(
        dataclasses.replace(Config.load(host.root), libvirt_uri=host.uri, disk_directory=host.images)
    )


def domains(operator: Operator, name: str) -> list[str]:
    listed = operator.virsh("list", "--all", "--name").split()
    return sorted(each for each in listed if each.startswith(f"{name}-"))


def disks(backend: Backend, name: str) -> list[str]:
    return [disk.name for disk in backend.disks.all() if disk.name.startswith(f"{name}-")]


@pytest.mark.slow
def test_a_set_is_created_scaled_updated_and_deleted(
    operator: Operator, template: Path, image: str, name: str
) -> None:
    operator.virt_sse("vmss", "create", name, template, "--image", image, "--instances", "2")
    assert domains(operator, name) == [f"{name}-1", f"{name}-2"]
    with opened(operator) as backend:
        first, second = (backend.disks.get(f"{name}-{number}") for number in (1, 2))
        assert first.deks[0].wrapped.ciphertext != second.deks[0].wrapped.ciphertext
        assert first.origin_id == second.origin_id == backend.disks.get(image).id
    operator.virsh("start", f"{name}-2")

    said = operator.virt_sse("vmss", "update", name, "--encryption-at-host", "on")
    for number in (1, 2):
        assert f"existing instance without encryption at host: {name}-{number}\n" in said
    operator.virt_sse("vmss", "scale", name, "3")
    with opened(operator) as backend:
        at_host = [view.encryption_at_host for view in backend.scale_sets.instances(name)]
        assert at_host == [False, False, True]
        assert backend.vms.show(f"{name}-3").properties.encryption_at_host
        assert backend.scale_sets.update(name, encryption_at_host=False) == [f"{name}-3"]
        with pytest.raises(VmStateError, match=f"domain '{name}-2' runs"):
            backend.scale_sets.scale(name, 1)
        assert disks(backend, name) == domains(operator, name) == [f"{name}-{n}" for n in (1, 2, 3)]
    operator.virsh("start", f"{name}-3")
    rows = json.loads(operator.virt_sse("vmss", "list", "-o", "json"))
    (listed,) = [each for each in rows if each["name"] == name]
    assert (listed["instances"], listed["state"]) == (3, "ready")
    shown = json.loads(operator.virt_sse("vmss", "show", name, "-o", "json"))
    assert [each["state"] for each in shown] == ["shut off", "running", "running"]

    with opened(operator) as backend:
        backend.scale_sets.scale(name, 1, force=True)
        assert disks(backend, name) == domains(operator, name) == [f"{name}-1"]
    operator.virt_sse("vmss", "delete", name)
    with opened(operator) as backend:
        assert disks(backend, name) == domains(operator, name) == []
        backend.disks.check(image)
        with pytest.raises(ScaleSetNotFoundError):
            backend.scale_sets.instances(name)


def test_invalid_sets_are_refused(operator: Operator, template: Path, image: str, name: str) -> None:
    xml = template.read_text()
    with opened(operator) as backend:
        sets = backend.scale_sets
        ours = xml.replace("<devices>", "<devices>" + backend.domains.disk_element(image))
        for wrong, error in (
            (ours, "settings of virt-sse"),
            ("<domain/>", "no <domain>"),
            ("<", "domain XML"),
        ):
            with pytest.raises(InvalidValueError, match=error):
                sets.create(name, wrong, image)
        with pytest.raises(DiskNotFoundError):
            sets.create(name, xml, f"{name}-none")
        with pytest.raises(InvalidValueError, match="invalid disk name"):
            sets.create("a/b", xml, image)
        assert name not in [each.name for each in sets.all()]
        sets.create(name, xml, image)
        with pytest.raises(ScaleSetExistsError):
            sets.create(name, xml, image)
        with pytest.raises(InvalidValueError, match="cannot have 1001 instances"):
            sets.scale(name, 1001)
        backend.disks.create(NewDisk(name=f"{name}-2", size=M, place=operator.host.images / f"{name}x"))
        with pytest.raises(DiskExistsError, match=f"{name}-2"):
            sets.scale(name, 2)
        assert domains(operator, name) == []
        assert sets.instances(name) == []
        backend.disks.erase(backend.disks.get(f"{name}-2"))
        sets.delete(name)


@pytest.mark.slow
def test_a_kill_anywhere_is_finished_by_the_next_command(
    operator: Operator, template: Path, image: str, name: str
) -> None:
    modules = (scale_sets, stored)
    xml = template.read_text()
    with opened(operator) as backend:
        backend.scale_sets.create(name, xml, image, size=1)

    def act() -> None:
        """Replace an instance by another, with encryption at host."""
        with opened(operator) as backend:
            backend.scale_sets.scale(name, 0)
            backend.scale_sets.update(name, encryption_at_host=True)
            backend.scale_sets.scale(name, 2)

    points = crash_points(modules, act)
    for point in points[:: max(1, len(points) // KILLS)]:
        assert dies_at(point, modules, act)
        with opened(operator) as backend:
            size = backend.scale_sets.scale(name, None).size
            expected = [f"{name}-{number}" for number in range(1, size + 1)]
            assert disks(backend, name) == domains(operator, name) == expected
            views = backend.scale_sets.instances(name)
            assert [view.name for view in views] == expected
            for view in views:
                assert view.is_defined
                assert view.encryption_at_host == view.instance.encryption_at_host
                backend.disks.check(view.name)
    with opened(operator) as backend:
        backend.scale_sets.delete(name)


def test_an_image_in_use_or_refused_leaves_no_instance_half_made(
    operator: Operator, template: Path, image: str, name: str
) -> None:
    with opened(operator) as backend:
        backend.scale_sets.create(name, template.read_text(), image)
        disk = backend.disks.get(image)
        disk.path.rename(disk.path.with_suffix(".away"))
        with pytest.raises(ImageError, match="is missing"):
            backend.scale_sets.scale(name, 1)
        assert domains(operator, name) == disks(backend, name) == []
        disk.path.with_suffix(".away").rename(disk.path)
        assert backend.scale_sets.scale(name, None).size == 1
        assert domains(operator, name) == disks(backend, name) == [f"{name}-1"]

        before = backend.disks.get(f"{name}-1")
        backend.disks.erase(before)
        with pytest.raises(DiskNotFoundError, match="has lost its disk"):
            backend.scale_sets.scale(name, None)
        operator.virsh("undefine", f"{name}-1")
        backend.scale_sets.scale(name, None)
        assert backend.disks.get(f"{name}-1").id != before.id
        backend.scale_sets.delete(name)

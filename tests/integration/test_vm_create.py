"""``virt-sse vm create`` with the definitions of virt-install, and virt-xml and virt-clone afterwards."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import uuid
from pathlib import Path

import pytest

import virt_sse.domains.new_domains
from support.faults import crash_points, dies_at
from support.images import require
from support.lab_operator import Operator
from virt_sse.backend import Backend
from virt_sse.config import Config
from virt_sse.domains.new_domains import DomainDiskChoice
from virt_sse.model.disks import NewDisk

M = 1 << 20
XML = """<domain type='qemu'><name>{name}</name>{uuid}<memory unit='MiB'>32</memory>
<os><type arch='x86_64' machine='pc'>hvm</type></os><devices/></domain>"""


def xml_of(name: str) -> str:
    """A small definition; every domain of the name has the same UUID."""
    return XML.format(name=name, uuid=f"<uuid>{uuid.uuid5(uuid.NAMESPACE_DNS, name)}</uuid>")


def virt_install(operator: Operator, name: str) -> Path:
    """The definition that virt-install prints, in a file."""
    require("virt-install")
    medium = operator.host.images / f"{name}.iso"
    medium.write_bytes(bytes(M))
    xml = operator.run(
        *("virt-install", "--name", name, "--memory", "32", "--vcpus", "1", "--import"),
        *("--disk", f"{medium},device=cdrom", "--boot", "hd,cdrom"),
        *("--virt-type", "qemu", "--os-variant", "detect=off,require=off", "--network", "none"),
        *("--graphics", "none", "--xml", "xpath.delete=./cpu", "--print-xml"),
    )
    path = operator.host.directory / f"{name}.xml"
    path.write_text(xml[xml.index("<domain") :])
    return path


def disks(operator: Operator) -> set[str]:
    return {disk["name"] for disk in json.loads(operator.virt_sse("disk", "list", "-o", "json"))}


def domains(operator: Operator) -> list[str]:
    return operator.virsh("list", "--all", "--name").split()


@pytest.mark.slow
def test_a_definition_of_virt_install_becomes_a_running_domain(operator: Operator, name: str) -> None:
    images, xml = operator.host.images, virt_install(operator, name)
    operator.create(f"{name}-data", "--size", "1M")
    printed = operator.virt_sse("vm", "create", xml, "--disk", f"{name}-data,bus=sata", "--print-xml")
    assert "<target dev='sda' bus='sata'" in printed.replace('"', "'")
    assert domains(operator) == []
    new = f"new:{name},size=1M,path={images}/{name}.qcow2,target=vdb,caching=ReadOnly"
    command = ("virt-sse", "vm", "create", "-", "--disk", new, "--disk", f"{name}-data,readonly=yes")
    program = ["sh", "-c", 'file=$1; shift; exec "$@" <"$file"', "sh", xml, *command]
    said = operator.run(*program, "--encryption-at-host", "--start")
    assert f"started domain {name}" in said
    shown = json.loads(operator.virt_sse("vm", "show", name, "-o", "json").partition("virt-sse: ")[0])
    assert (shown["state"], shown["encryption-at-host"], shown["problem"]) == ("running", "on", None)
    assert [(disk["target"], disk["name"], disk["caching"]) for disk in shown["disks"]] == [
        ("vda", f"{name}-data", "None"),
        ("vdb", name, "ReadOnly"),
    ]
    operator.virsh("destroy", name)

    require("virt-xml", "virt-clone")
    operator.run("virt-xml", name, "--edit", "--memory", "48")
    operator.run("virt-xml", name, "--add-device", "--disk", f"path={images}/{name}.plain,size=0.001")
    assert "49152 KiB" in operator.virsh("dominfo", name)
    assert f"{name}.plain" in operator.virsh("domblklist", name)

    def refusal() -> str:
        """virt-clone's words, now and then with a traceback of its own."""
        clone = ["virt-clone", "--original", name, "--name", f"{name}-2", "--auto-clone"]
        done = subprocess.run(clone, env=operator.host.environment, capture_output=True, text=True)
        assert done.returncode == 1
        return done.stderr

    before = set(images.iterdir())
    assert "Disk network type 'nbd' is not cloneable" in refusal()
    operator.virt_sse("vm", "update", name, "--encryption-at-host", "off", "--disk-caching", "vdb=None")
    assert "A single <secret" in refusal()
    assert {path.name for path in set(images.iterdir()) - before} <= {f"{name}-2.plain"}
    assert domains(operator) == [name]


@pytest.mark.slow
def test_nothing_is_left_after_an_error(operator: Operator, name: str) -> None:
    path, known = operator.host.directory / f"{name}.xml", disks(operator)
    new = f"new:{name},size=1M,path={operator.host.images}/{name}.qcow2"

    def refusal(*arguments: str, xml: str = xml_of(name), status: int = 1) -> str:
        path.write_text(xml)
        said = operator.virt_sse("vm", "create", path, *arguments, status=status)
        assert domains(operator) == []
        assert disks(operator) == known
        assert not (operator.host.images / f"{name}.qcow2").exists()
        return said

    assert "no disk 'nowhere'" in refusal("--disk", new, "--disk", "nowhere")
    assert "is not a folder" in refusal("--disk", new, "--disk", f"new:{name}-b,size=1M,path=/nowhere/b")
    unknown = xml_of(name).replace("machine='pc'", "machine='none-such'")
    assert "error: libvirt: " in refusal("--disk", new, xml=unknown)
    no_network = "<interface type='network'><source network='none-such'/></interface>"
    xml = xml_of(name).replace("<devices/>", f"<devices>{no_network}</devices>")
    assert "network" in refusal("--disk", new, "--encryption-at-host", "--start", xml=xml)
    assert "no size" in refusal("--disk", f"new:{name}", status=2)
    assert "invalid option 'size=1M'" in refusal("--disk", "web,size=1M", status=2)
    assert "goes with neither" in refusal("--print-xml", "--start", status=2)
    assert "several definitions" in refusal(xml=2 * xml_of(name), status=2)
    assert "invalid domain XML" in refusal(xml="<network/>", status=2)

    path.write_text(xml_of(name))
    operator.virt_sse("vm", "create", path, "--disk", new, "--start")
    assert "has a domain" in operator.virt_sse("vm", "create", path, status=1)
    assert domains(operator) == [name]


@pytest.mark.slow
def test_a_kill_leaves_all_or_nothing(operator: Operator, name: str) -> None:
    config = dataclasses.replace(Config.load(operator.host.root), libvirt_uri=operator.host.uri)

    def create(each: str) -> None:
        place = operator.host.images / f"{each}.raw"
        with Backend(config) as b:
            b.new_domains.create(xml_of(each), [DomainDiskChoice(NewDisk(name=each, size=M, place=place))])

    known, modules = disks(operator), [virt_sse.domains.new_domains]
    points = crash_points(modules, lambda: create(name))
    outcomes = set()
    for point in points[len(points) // 3 :: len(points) // 7]:
        each = f"t{uuid.uuid4().hex[:8]}"
        assert dies_at(point, modules, lambda each=each: create(each))  # type: ignore[misc]
        with Backend(config) as b:
            found = {disk.name for disk in b.disks.all()} - known - {name}
        assert found in (set(), {each})
        assert (each in domains(operator)) is bool(found)
        assert (operator.host.images / f"{each}.raw").exists() is bool(found)
        outcomes.add(bool(found))
        if found:
            operator.virsh("undefine", each)
            operator.virt_sse("disk", "delete", each, "--yes")
    assert False in outcomes
    assert list(config.new_domains.iterdir()) == []


def test_a_started_domain_is_not_undone(operator: Operator, name: str) -> None:
    path = operator.host.directory / f"{name}.xml"
    path.write_text(xml_of(name))
    image = operator.host.images / f"{name}.qcow2"
    operator.virt_sse("vm", "create", path, "--disk", f"new:{name},size=1M,path={image}")
    disk = json.loads(operator.virt_sse("disk", "show", name, "-o", "json"))["id"]
    record = Config.load(operator.host.root).new_domains / f"{operator.virsh('domuuid', name).strip()}.json"
    record.write_text(json.dumps({"disks": [disk]}))  # as after a kill just before the end
    operator.virsh("start", name)
    operator.virsh("destroy", name)
    operator.virt_sse("disk", "check", name)
    assert domains(operator) == [name]
    assert not record.exists()

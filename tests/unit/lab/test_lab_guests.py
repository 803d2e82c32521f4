from __future__ import annotations

import base64
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from virt_sse.errors import LabError
from virt_sse.lab.guests import disk_xml, domain_xml, script_output
from virt_sse.lab.recipes import LinuxMicro
from virt_sse.libvirt.xml import parse_xml

LINUX = LinuxMicro(Path("/boot/vm & linuz"), Path("/boot/initramfs"))
DISKS = [
    disk_xml(Path("/images/a's.img")),
    disk_xml(Path("/images/b.qcow2"), target="vdb", image_format="qcow2"),
]


def parsed(*, boot: LinuxMicro | None = None, script: str = "", name: str = "<&>") -> ET.Element:
    text = domain_xml(
        name, domain_type="qemu", disks=DISKS, serial_log=Path("/log/<s>"), boot=boot, script=script
    )
    return parse_xml(text, kind="domain XML")


def test_names_and_paths_are_escaped() -> None:
    domain = parsed(boot=LINUX)
    assert domain.findtext("name") == "<&>"
    assert domain.findtext("os/kernel") == "/boot/vm & linuz"
    assert domain.find("devices/serial/source").attrib == {"path": "/log/<s>"}
    assert [source.get("file") for source in domain.iter("source")][:2] == [
        "/images/a's.img",
        "/images/b.qcow2",
    ]


def test_the_bios_sees_all_disks_in_their_order() -> None:
    domain = parsed()
    assert domain.find("os/kernel") is None
    assert [boot.get("order") for boot in domain.findall("devices/disk/boot")] == ["1", "2"]


def test_linux_gets_its_script_on_the_command_line() -> None:
    command_line = parsed(boot=LINUX, script="echo 'ä' && exit 1").findtext("os/cmdline")
    encoded = command_line.split("sse.script=")[1]
    assert base64.b64decode(encoded).decode() == "echo 'ä' && exit 1"


def test_a_script_too_long_for_the_command_line_is_refused() -> None:
    longest = next(size for size in range(2000, 0, -1) if fits("x" * size))
    with pytest.raises(LabError, match=rf"a script of {longest + 1} bytes: .* holds {longest}"):
        parsed(boot=LINUX, script="x" * (longest + 1))


def fits(script: str) -> bool:
    try:
        parsed(boot=LINUX, script=script)
    except LabError:
        return False
    return True


def test_the_uuid_follows_from_the_name() -> None:
    assert parsed(name="a").findtext("uuid") == parsed(name="a").findtext("uuid")
    assert parsed(name="a").findtext("uuid") != parsed(name="b").findtext("uuid")


@pytest.mark.parametrize(
    ("serial", "output"),
    [
        ("linux-micro: begin\nlinux-micro: exit 0\n", ""),
        ("noise\nlinux-micro: begin\none\ntwo\nlinux-micro: exit 0\n[ 1.0] Power down\n", "one\ntwo\n"),
        ("linux-micro: begin\nno newlinelinux-micro: exit 0\n", "no newline"),
        (
            "linux-micro: begin\na\nlinux-micro: exit 0\n..\nlinux-micro: begin\nb\nlinux-micro: exit 0\n",
            "a\nb\n",
        ),
    ],
)
def test_a_scripts_output_is_cut_out(serial: str, output: str) -> None:
    assert script_output(serial) == output


@pytest.mark.parametrize(
    ("serial", "complaint"),
    [
        ("", "did not come to run its script"),
        ("linux-micro: begin\nhalf", "did not end"),
        ("linux-micro: begin\nlinux-micro: exit 12\n", "exited 12"),
        ("linux-micro: begin\nlinux-micro: exit 0\nlinux-micro: begin\nlinux-micro: exit 2\n", "exited 2"),
    ],
)
def test_a_script_that_fails_is_an_error(serial: str, complaint: str) -> None:
    with pytest.raises(LabError, match=complaint):
        script_output(serial)

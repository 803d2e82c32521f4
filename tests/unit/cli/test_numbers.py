"""Numbers and texts on the command line that no parser of Python's takes."""

from __future__ import annotations

import pytest

from support.command_line import CommandLine
from virt_sse.errors import LibvirtUnavailableError
from virt_sse.libvirt.connection import connected

HUGE = "9" * 5000


@pytest.mark.parametrize(
    "arguments",
    [
        ("disk", "create", "disk", "--size", HUGE),
        ("disk", "create", "disk", "--size", HUGE + "G"),
        ("disk", "create", "disk", "--size", b"\xed\xa0\x80"),
        ("disk", "resize", "disk", HUGE),
        ("vm", "update", "vm", "--temp-disk-size", HUGE),
        ("des", "create", "set", "--key", f"https://vault:{HUGE}/keys/key"),
        ("des", "create", "set", "--key", "https://[::1/keys/key"),
        ("des", "create", "set", "--key", b"https://vault/keys/\xff"),
        ("audit", "list", "--since", HUGE + "d"),
        ("audit", "list", "--since", "0001-01-01"),
        ("audit", "list", "--correlation", HUGE),
        ("audit", "verify", "--anchor", HUGE + ":00"),
    ],
)
def test_a_strange_argument_is_wrong_usage(virt_sse: CommandLine, arguments: tuple[str | bytes, ...]) -> None:
    assert len(virt_sse.refuses(*arguments, status=2)) < 6000


@pytest.mark.parametrize(
    "uri", ["\udcff", "qemu:///\ud800", "qemu:///a\0b", "qemu://[", f"qemu://h:{HUGE}/system"]
)
def test_a_strange_uri_of_libvirt_is_an_error(uri: str) -> None:
    with pytest.raises(LibvirtUnavailableError), connected(uri):
        pass

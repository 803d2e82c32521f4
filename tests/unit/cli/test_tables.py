"""Tables fit a terminal: long texts are shortened in the middle, whatever characters they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.command_line import CommandLine
from support.terminals import on_terminal
from virt_sse.backend import Backend
from virt_sse.cli.tables import display_width, format_table, shorten
from virt_sse.errors import printable
from virt_sse.model.disks import NewDisk

KEY = "https://payroll-production.vault.azure.net:443/keys/payroll-disks/0123456789abcdef0123456789abcdef"
WIDE = "磁盘加密集合" * 6
COMBINING = "e\u0301" * 40
HEADINGS = ("NAME", "SIZE", "FORMAT", "STATE", "KEY", "PATH")


@pytest.mark.parametrize("name", ["web", "n" * 80, WIDE, COMBINING, printable("a\x1b[31m\u202e\r\nb" * 9)])
def test_a_listing_fits_80_columns(name: str) -> None:
    line = (name, "128G", "qcow2", "re-encrypting", KEY, f"/var/lib/libvirt/images/payroll/{name}.qcow2")
    table = list(format_table([HEADINGS, line], 80))
    assert max(map(display_width, table)) <= 80
    assert all(text.isprintable() for text in table)
    starts = [table[0].index(heading) for heading in HEADINGS]
    assert [display_width(table[1][:at]) for at in _cells(table[1])] == starts


def _cells(line: str) -> list[int]:
    """The indexes at which the cells of a line begin."""
    return [at for at in range(len(line)) if line[at] != " " and (at == 0 or line[at - 1] == " ")]


def test_names_are_shortened_last() -> None:
    line = ("database-of-the-payroll", "128G", "qcow2", "ready", KEY, "/var/lib/libvirt/images/payroll.qcow2")
    text = list(format_table([HEADINGS, line], 80))[1]
    assert text.split()[:4] == ["database-of-the-payroll", "128G", "qcow2", "ready"]
    assert list(format_table([HEADINGS, line], None))[1].split() == list(line)


def test_a_shortened_key_shows_host_name_and_version() -> None:
    assert shorten(KEY, 60) == "https://payroll…re.net:443/keys/payroll-disks/0123456…abcdef"
    assert shorten("platform-managed:default", 30) == "platform-managed:default"
    assert shorten("/var/lib/libvirt/images/web.qcow2", 28) == "/var/lib/libvirt/…/web.qcow2"


@pytest.mark.parametrize("text", [KEY, WIDE, COMBINING, "/" * 200, "a" * 200, "a/" * 100, "", "…" * 90])
def test_a_shortened_text_keeps_beginning_and_end(text: str) -> None:
    for most in range(1, 100):
        short = shorten(text, most)
        assert display_width(short) <= most
        if short != text:
            assert display_width(text) > most
            assert "…" in short
        if most > 20 and short != text:
            assert short[:2] == text[:2]
            assert short[-1:] == text[-1:]


def lines_on_terminal(root: Path, columns: int, *arguments: str) -> list[str]:
    """The lines that ``virt-sse`` prints on a terminal with so many columns."""
    status, said = on_terminal(root, *arguments, columns=columns)
    assert status == 0, said
    return said.splitlines()


def test_a_terminal_gets_what_fits_and_a_pipe_gets_all(
    root: Path, backend: Backend, virt_sse: CommandLine
) -> None:
    disk = backend.disks.create(NewDisk(name="n" * 60, size=1 << 20))
    whole = virt_sse("disk", "list").splitlines()
    assert whole[1].endswith(str(disk.path))
    assert max(map(len, whole)) > 80
    assert max(map(len, lines_on_terminal(root, 80, "disk", "list"))) <= 80
    assert lines_on_terminal(root, 80, "disk", "list", "--wide") == whole
    lines = lines_on_terminal(root, 80, "audit", "list")
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["TIME", "RESULT", "ACTION", "KEY", "DISK", "DOMAIN", "REASON"]

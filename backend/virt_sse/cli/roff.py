"""The man pages, for groff and mandoc: ``virt-sse.1``, and a page for each noun.

:mod:`virt_sse.cli.man_pages` puts the man pages into the wheel, and ``virt-sse host init`` onto a host.
``python -m virt_sse.cli.roff DIRECTORY`` writes them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import virt_sse
from virt_sse.cli.reference import (
    EXIT_STATUSES,
    PROGRAM,
    CommandReference,
    Parameter,
    command_line,
    sentence,
    usage,
)
from virt_sse.system.files import shared_folder, write_shared


def man_pages(root: CommandReference) -> dict[str, str]:
    """The man pages by file name: ``virt-sse.1``, and a page for each noun."""
    pages = {f"{PROGRAM}.1": _root_page(root)}
    for noun in root.commands:
        pages[f"{'-'.join((PROGRAM, *noun.path))}.1"] = _noun_page(noun)
    return pages


def _root_page(root: CommandReference) -> str:
    lines = [*_head(root), ".SH SYNOPSIS", f".B {_roff(PROGRAM)}", r"\fINOUN VERB\fR [\fIOPTIONS\fR]"]
    lines += [".SH DESCRIPTION", *_roff_help(root)]
    lines += [".SH NOUNS"]
    for noun in root.commands:
        lines += [".TP", rf"\fB{_roff(noun.path[-1])}\fR", _roff(noun.help[0])]
    lines += [".SH OPTIONS", *_roff_parameters(root.options)]
    lines += [".SH EXIT STATUS", *_tagged(EXIT_STATUSES.items())]
    lines += [".SH ENVIRONMENT"]
    lines += _tagged(
        [
            ("VIRT_SSE_ROOT", "A folder for everything that otherwise lies in /etc, /var and /run."),
            ("LIBVIRT_DEFAULT_URI", "The libvirt connection; overrides the configuration."),
        ]
    )
    lines += [".SH FILES"]
    lines += _tagged([("/etc/virt-sse/config.toml", "The configuration. All options are optional.")])
    lines += [".SH SEE ALSO"]
    names = ["-".join((PROGRAM, *noun.path)) for noun in root.commands] + ["virsh"]
    lines.append(",\n".join(rf"\fB{_roff(name)}\fR(1)" for name in names))
    return "\n".join(lines) + "\n"


def _noun_page(noun: CommandReference) -> str:
    lines = [*_head(noun), ".SH SYNOPSIS"]
    leaves = list(noun.leaves()) or [noun]
    for each in leaves:
        words = usage(each).removeprefix(each.name).strip()
        lines += [rf"\fB{_roff(each.name)}\fR {_roff(words)}", ".br"]
    lines[-1:] = [".SH DESCRIPTION", *_roff_help(noun)]
    lines += [".SH COMMANDS"] if noun.commands else []
    for each in leaves:
        lines += [f".SS {_roff(' '.join(each.path))}", *_roff_help(each)] if noun.commands else []
        lines += _roff_parameters([*each.arguments, *each.options])
        lines += [".PP", "Example:", ".br", rf"\fB{_roff(each.example)}\fR"] if each.example else []
    lines += [".SH SEE ALSO", rf"\fB{_roff(PROGRAM)}\fR(1)"]
    return "\n".join(lines) + "\n"


def _head(command: CommandReference) -> list[str]:
    name = "-".join((PROGRAM, *command.path))
    title = f'.TH {_roff(name.upper())} 1 "" "virt\\-sse {virt_sse.__version__}" "virt\\-sse"'
    return [title, ".SH NAME", rf"{_roff(name)} \- {_roff(command.help[0].rstrip('.'))}"]


def _roff_help(command: CommandReference) -> list[str]:
    return [
        line for number, text in enumerate(command.help) for line in ([".PP"] * bool(number) + [_roff(text)])
    ]


def _roff_parameters(parameters: Sequence[Parameter]) -> list[str]:
    lines = []
    for each in parameters:
        label = ", ".join(rf"\fB{_roff(name)}\fR" for name in each.names) + (" " if each.names else "")
        dots = "..." if each.repeated and not each.names else ""
        label += rf"\fI{_roff(each.value)}\fR{dots}" if each.value else ""
        lines += [".TP", label.strip(), _roff(sentence(each)) or r"\&"]
    return lines


def _tagged(entries: Iterable[tuple[str, str]]) -> list[str]:
    return [line for tag, text in entries for line in (".TP", rf"\fB{_roff(tag)}\fR", _roff(text))]


def _roff(text: str) -> str:
    """*text* for groff and mandoc, in ASCII; no line of the result is a request."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace('"', r"\(dq")
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)
    return rf"\&{text}" if text.startswith(".") else text


def write_man_pages(directory: Path, root: CommandReference) -> list[Path]:
    """Write the man pages into *directory*, and create the directory if necessary; the files' paths."""
    shared_folder(directory)
    paths = []
    for name, page in man_pages(root).items():
        write_shared(directory / name, page.encode("ascii"))
        paths.append(directory / name)
    return paths


if __name__ == "__main__":
    write_man_pages(Path(sys.argv[1]), command_line())

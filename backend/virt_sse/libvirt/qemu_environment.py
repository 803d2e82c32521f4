"""Environment variables for a domain's QEMU, and the code that QEMU loads because of them.

libvirt sets the variables of ``<qemu:commandline><qemu:env name='…' value='…'/>`` (libvirt drvqemu,
"Pass-through of arbitrary QEMU commands"). A domain with such variables is marked as tainted by
``custom-argv``.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import InvalidValueError

QEMU_NAMESPACE = "http://libvirt.org/schemas/domain/qemu/1.0"
QEMU_PREFIX = "qemu"
PRELOAD = "LD_PRELOAD"
_COMMAND_LINE = f"{{{QEMU_NAMESPACE}}}commandline"
_VARIABLE = f"{{{QEMU_NAMESPACE}}}env"
_SEPARATORS = {
    PRELOAD: r"[\s:]+",
    "LD_AUDIT": r":",
    "LD_LIBRARY_PATH": r"[:;]",
    "GCONV_PATH": r":",
    "QEMU_MODULE_DIR": r"\0",
}
"""Variables of ld.so(8), iconv(3) and QEMU that name libraries, or folders with libraries."""


@dataclass(frozen=True, slots=True)
class LoadedCode:
    """A library, or a folder of libraries, that a variable makes QEMU load.

    :ivar name: a path, or the bare name of a library in a system folder.
    """

    variable: str
    name: str

    def __str__(self) -> str:
        return f"{self.name[:200]!r} ({self.variable})"


def variables(domain: ET.Element) -> list[tuple[str, str]]:
    """Names and values of the variables in the ``<domain>`` element *domain*."""
    found = domain.iterfind(f"./{_COMMAND_LINE}/{_VARIABLE}")
    return [(each.get("name", ""), each.get("value", "")) for each in found]


def loaded_code(environment: Iterable[tuple[str, str]]) -> tuple[LoadedCode, ...]:
    """The code that QEMU loads because of the variables *environment*."""
    return tuple(
        LoadedCode(variable, name)
        for variable, value in environment
        if variable in _SEPARATORS
        for name in re.split(_SEPARATORS[variable], value)
        if name
    )


def preload(domain: ET.Element, library: Path, settings: Mapping[str, str]) -> None:
    """Make the domain's QEMU preload *library*, and set those variables of *settings* that are not set.

    :raise InvalidValueError: When the domain preloads another library.
    """
    drop_preload(domain, library, settings)
    present = dict(variables(domain))
    loaded = [each.name for each in loaded_code(present.items()) if each.variable == PRELOAD]
    if loaded and str(library) not in loaded:
        raise InvalidValueError(
            f"the domain's QEMU preloads a library of its own: {', '.join(loaded)[:200]}",
            hint=f"remove {PRELOAD} from <qemu:commandline> with 'virsh edit'",
        )
    command_line = domain.find(_COMMAND_LINE)
    if command_line is None:
        command_line = ET.SubElement(domain, _COMMAND_LINE)
    for name, value in {PRELOAD: str(library), **settings}.items():
        if name not in present:
            ET.SubElement(command_line, _VARIABLE, name=name, value=value)


def drop_preload(domain: ET.Element, library: Path, settings: Mapping[str, str]) -> None:
    """Take *library* out of the preloaded libraries, and with it the variables set by :func:`preload`.

    These directly follow ``LD_PRELOAD``; variables of the same names elsewhere stay.
    """
    for command_line in domain.findall(_COMMAND_LINE):
        for position, element in enumerate(list(command_line)):
            if element.tag == _VARIABLE and element.get("name") == PRELOAD:
                kept = _without(element.get("value", ""), str(library))
                if kept is None:
                    continue
                for follower in _followers(command_line, position, settings):
                    command_line.remove(follower)
                if kept:
                    element.set("value", kept)
                else:
                    command_line.remove(element)
        if len(command_line) == 0:
            domain.remove(command_line)


def _without(value: str, library: str) -> str | None:
    """*value* without *library*; ``None`` if *value* does not name the library."""
    names = [name for name in re.split(_SEPARATORS[PRELOAD], value) if name]
    return ":".join(name for name in names if name != library) if library in names else None


def _followers(command_line: ET.Element, position: int, settings: Mapping[str, str]) -> Iterator[ET.Element]:
    left = set(settings)
    for element in list(command_line)[position + 1 :]:
        name = element.get("name", "")
        if element.tag != _VARIABLE or name not in left:
            return
        left.remove(name)
        yield element

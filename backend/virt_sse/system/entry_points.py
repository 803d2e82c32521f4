"""Entry points of the installed distributions, without :mod:`importlib.metadata`.

The import of :mod:`importlib.metadata` loads email, zipfile and more: a tenth of the time of a short command
and of a libvirt hook.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_METADATA = re.compile(r"([^-]+)(-.*)?\.(dist|egg)-info")


@dataclass(frozen=True, slots=True)
class InstalledEntryPoint:
    """An entry point of a distribution ("Entry points specification", PyPA).

    :ivar value: ``MODULE`` or ``MODULE:ATTRIBUTE``.
    """

    name: str
    value: str

    def load(self) -> object:
        """Import the module; return the module or its attribute."""
        module, _, attribute = (part.strip() for part in self.value.partition("[")[0].partition(":"))
        found: object = importlib.import_module(module)
        for name in attribute.split(".") if attribute else ():
            found = getattr(found, name)
        return found


def installed_entry_points(group: str) -> list[InstalledEntryPoint]:
    """The entry points in *group* of all distributions on ``sys.path``.

    Of several versions of a distribution, the first on the path counts.
    """
    seen: set[str] = set()
    found: list[InstalledEntryPoint] = []
    for folder in sys.path:
        for distribution, path in _distributions(folder or "."):
            if distribution in seen:
                continue
            seen.add(distribution)
            try:
                text = path.read_text("utf-8")
            except OSError:
                continue
            found += _parse(text, group)
    return found


def _distributions(folder: str) -> Iterator[tuple[str, Path]]:
    """Normalised name, and path of the file of entry points, of each distribution in *folder*."""
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 -- names alone, of many files
    except OSError:
        return
    for name in names:
        if match := _METADATA.fullmatch(name):
            yield re.sub(r"[-_.]+", "-", match[1]).lower(), Path(folder, name, "entry_points.txt")


def _parse(text: str, group: str) -> Iterator[InstalledEntryPoint]:
    section = None
    for line in map(str.strip, text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif section == group and line and line[0] not in "#;":
            name, _, value = line.partition("=")
            yield InstalledEntryPoint(name.strip(), value.strip())

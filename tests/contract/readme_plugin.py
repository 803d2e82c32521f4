"""The key provider of ``plugins/README.md``, taken from its text."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

from support.folders import REPOSITORY

_README = REPOSITORY / "plugins/README.md"


def install(folder: Path) -> list[EntryPoint]:
    """Write the example's module into *folder*, and return the entry points of its ``pyproject.toml``."""
    example = _README.read_text("utf-8").split("## A key provider in about 60 lines")[1]
    source, project = (
        re.findall(rf"^```{language}\n(.*?)^```$", example, re.MULTILINE | re.DOTALL)[0]
        for language in ("python", "toml")
    )
    groups = tomllib.loads(project)["project"]["entry-points"]
    entry_points = [
        EntryPoint(name, value, group) for group, entries in groups.items() for name, value in entries.items()
    ]
    (folder / f"{entry_points[0].module}.py").write_text(source, "utf-8")
    return entry_points

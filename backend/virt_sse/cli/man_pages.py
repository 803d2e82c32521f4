"""The build command that writes man pages into the wheel; used by setuptools only, see ``pyproject.toml``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path

import setuptools  # noqa: F401 -- before distutils, which setuptools replaces

from distutils.command.install_data import install_data  # isort: skip

_ROOT = Path(__file__).parents[3]
_FOLDER = "share/man/man1"


class InstallManPages(install_data):
    """Generates the man pages from the commands, then installs them."""

    def run(self) -> None:
        """Run the command (distutils)."""
        sys.path[:0] = [str(_ROOT / "backend"), str(_ROOT / "plugins")]
        from virt_sse.cli import reference, roff
        from virt_sse.plugins import ENTRY_POINT_GROUP

        declared: Mapping[str, Sequence[str]] = getattr(self.distribution, "entry_points", {})
        plugins = []
        for entry in declared[ENTRY_POINT_GROUP]:
            name, _, value = entry.partition("=")
            plugins.append(EntryPoint(name.strip(), value.strip(), ENTRY_POINT_GROUP))
        pages = roff.write_man_pages(_ROOT / "build/man", reference.command_line(plugins))
        self.data_files = [(_FOLDER, [str(page.relative_to(_ROOT)) for page in pages])]
        super().run()

"""Puts the man pages into the wheel; everything else about the build is in pyproject.toml."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

from setuptools import setup  # before distutils, which is setuptools' own from then on

from distutils.command.install_data import install_data  # isort: skip

HERE = Path(__file__).parent
MAN = "share/man/man1"


class InstallManPages(install_data):
    """Write the man pages from the commands, then install them."""

    def run(self) -> None:
        sys.path[:0] = [str(HERE / "backend"), str(HERE / "plugins")]
        from virt_sse.cli import reference

        group = self.distribution.entry_points[reference.ENTRY_POINT_GROUP]
        plugins = [
            EntryPoint(*map(str.strip, each.split("=")), reference.ENTRY_POINT_GROUP) for each in group
        ]
        pages = reference.write_man_pages(HERE / "build/man", reference.command_line(plugins))
        self.data_files = [(MAN, [str(page.relative_to(HERE)) for page in pages])]
        super().run()


setup(cmdclass={"install_data": InstallManPages}, data_files=[(MAN, [])])

"""The build command for ``libvirt_sse_xts.so``; used by setuptools only."""

from __future__ import annotations

import platform

from setuptools.command.build_ext import build_ext

_MACHINES = ("x86_64", "AMD64")


class BuildLibrary(build_ext):  # type: ignore[misc] # setuptools has no types
    """Compiles the library as a plain shared object, which no Python imports, beside this file.

    Without a C compiler, or on another kind of processor, the package is built without the library.
    """

    def run(self) -> None:
        """Run the command (distutils)."""
        if platform.machine() in _MACHINES:
            super().run()

    def get_ext_filename(self, fullname: str) -> str:
        """The file's path in the package: no Python version in its name."""
        return f"{fullname.replace('.', '/')}.so"

    def get_outputs(self) -> list[str]:
        """The files of the wheel (distutils)."""
        return super().get_outputs() if platform.machine() in _MACHINES else []

"""The build command that copies ``vm-images/`` into the wheel; used by setuptools only."""

from __future__ import annotations

from pathlib import Path

from setuptools.command.build_py import build_py

_RECIPES = Path("vm-images")
_TARGET = "virt_sse/lab/vm-images"


class BuildRecipes(build_py):  # type: ignore[misc] # setuptools has no types
    """Builds the packages, and puts the recipes of the lab's guests beside :mod:`virt_sse.lab.recipes`."""

    def run(self) -> None:
        """Run the command (distutils). An editable package uses the recipes of the checkout."""
        super().run()
        if not self.editable_mode:
            for source, target in self._recipes().items():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))  # with the mode: builds are programs

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """The files of the wheel (distutils)."""
        return [*super().get_outputs(include_bytecode), *map(str, self._recipes().values())]

    def get_source_files(self) -> list[str]:
        """The files of the source distribution (setuptools)."""
        return [*super().get_source_files(), *map(str, self._recipes())]

    def _recipes(self) -> dict[Path, Path]:
        return {
            path: Path(self.build_lib, _TARGET, path.relative_to(_RECIPES))
            for path in sorted(_RECIPES.rglob("*"))
            if path.is_file()
        }

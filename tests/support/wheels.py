"""A wheel of the checkout, and fresh virtual environments with exactly what pip would install there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from support.folders import REPOSITORY

_SETUPTOOLS = 77
_SECONDS = 300
_SOURCES = ("LICENSE", "README.md", "pyproject.toml", "backend", "plugins", "vm-images")
_FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def built_wheel(folder: Path) -> Path:
    """Build virt-sse's wheel from a copy of the checkout, without a network."""
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "0"
    if int(found.split(".")[0]) < _SETUPTOOLS:
        pytest.skip(f"needs setuptools {_SETUPTOOLS} or newer: pip install setuptools")
    source = folder / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so", "docs")
    for name in _SOURCES:
        path = REPOSITORY / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy2(path, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


def pip(*arguments: str | Path, python: Path | None = None) -> None:
    """Run pip without an index, for the environment of *python*."""
    of = [] if python is None else ["--python", python]
    command = [sys.executable, "-m", "pip", *of, *arguments, "--quiet", "--no-index"]
    subprocess.run(
        [*command, "--disable-pip-version-check"], check=True, stdin=subprocess.DEVNULL, timeout=_SECONDS
    )


def fresh_environment(folder: Path, *requirements: str) -> Path:
    """A virtual environment with the dependencies of *requirements*, as links to this environment's packages.

    :param requirements: as pip takes them; virt-sse itself is left out.
    :return: the environment's Python.
    """
    venv.create(folder, with_pip=False, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site = Path(sysconfig.get_path("purelib", "venv", vars=scheme))
    for each in _with_dependencies(requirements):
        if each.name != "virt-sse":
            _link(each, site)
    return folder / "bin/python"


def write_files_of(document: Path, folder: Path) -> None:
    """Write the files of a document, code blocks after a line ``<!-- file: PATH -->``, below *folder*."""
    for path, text in _FILE.findall(document.read_text("utf-8")):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")


def _with_dependencies(requirements: tuple[str, ...]) -> list[Distribution]:
    found: dict[tuple[str, str], Distribution] = {}
    wanted = [Requirement(each) for each in requirements]
    while wanted:
        requirement = wanted.pop()
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) in found:
                continue
            installed = distribution(requirement.name)
            found[requirement.name, extra] = installed
            further = map(Requirement, installed.requires or ())
            wanted += [e for e in further if e.marker is None or e.marker.evaluate({"extra": extra})]
    return list(found.values())


def _link(installed: Distribution, site: Path) -> None:
    for name in {
        each.parts[0] for each in installed.files or () if each.parts[0] not in ("..", "__pycache__")
    }:
        target = site / name
        if not target.exists():
            target.symlink_to(Path(str(installed.locate_file(name))))

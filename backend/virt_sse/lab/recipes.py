"""The guests of ``vm-images/``: found, built on first use, kept in the lab's cache.

A recipe is a folder with an executable ``build``, which makes the guest in the folder it is given. What it
made is kept under a hash of the recipe, so a recipe that changes is built anew.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import LabError, LabUnavailableError
from virt_sse.lab import cache
from virt_sse.lab.requirements import require

BOOT_SECTOR_TEXT = b"virt-sse boot-sector marker: not to be found in the raw image. "
"""What boot-sector holds, and writes over and over from sector 1000 on."""

_TOOLS = {
    "boot-sector": ("as", "ld"),
    "linux-micro": ("apt-get", "dpkg", "busybox", "cpio"),
}


@dataclass(frozen=True, slots=True)
class LinuxMicro:
    """A kernel and an initramfs that runs the script on its command line (``sse.script=BASE64``)."""

    kernel: Path
    initramfs: Path


def boot_sector_image(*, stays: bool = False) -> Path:
    """The boot-sector guest: a raw image of 1 MiB, to be copied or imported, not to be written.

    :param stays: whether it goes on running, halted, when it is done, rather than power off.
    :raise LabUnavailableError: When ``vm-images/`` or a tool to build it is missing.
    :raise LabError: When its recipe fails.
    """
    return built("boot-sector") / ("boot-sector-stays.img" if stays else "boot-sector.img")


def linux_micro() -> LinuxMicro:
    """The linux-micro guest. Building it downloads the distribution's kernel package.

    :raise LabUnavailableError: When ``vm-images/`` or a tool to build it is missing.
    :raise LabError: When its recipe fails.
    """
    folder = built("linux-micro")
    return LinuxMicro(folder / "vmlinuz", folder / "initramfs.cpio")


def vm_images() -> Path:
    """The folder of the recipes: ``VIRT_SSE_VM_IMAGES``, else that of the checkout this package lies in.

    :raise LabUnavailableError: When neither is there.
    """
    chosen = os.environ.get("VIRT_SSE_VM_IMAGES")
    folder = Path(chosen) if chosen else Path(__file__).resolve().parents[3] / "vm-images"
    if not folder.is_dir():
        raise LabUnavailableError(
            f"the guests' recipes are not in {folder}",
            hint="set VIRT_SSE_VM_IMAGES to the vm-images folder of a checkout",
        )
    return folder


def built(name: str) -> Path:
    """The folder with what the recipe *name* makes, built now unless it is cached.

    :raise LabUnavailableError: When the recipe or a tool it needs is missing.
    :raise LabError: When it fails; a note carries the end of what it said.
    """
    recipe = vm_images() / name
    if not (recipe / "build").is_file():
        raise LabUnavailableError(f"there is no recipe {recipe}/build")
    result = cache.cache_directory() / f"{name}-{recipe_hash(recipe)}"
    with cache.locked(name):
        if not result.is_dir():
            require(*_TOOLS.get(name, ()))
            _build(recipe, result)
    return result


def recipe_hash(recipe: Path) -> str:
    """16 hex digits over the names and contents of all files of a recipe."""
    digest = hashlib.sha256()
    for path in sorted(path for path in recipe.rglob("*") if path.is_file()):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(recipe)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _build(recipe: Path, result: Path) -> None:
    """Build beside *result* and rename, so that it is whole or absent."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{recipe.name}-", dir=result.parent))
    try:
        run = subprocess.run(
            [recipe / "build", temporary],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            said = run.stdout.strip().splitlines() or ["nothing said"]
            error = LabError(f"{recipe}/build exited {run.returncode}: {said[-1]}")
            error.add_note("\n".join(said[-20:]))
            raise error
        temporary.rename(result)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

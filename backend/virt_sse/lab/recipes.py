"""The guests of ``vm-images/``: built on first use, and kept in the lab's cache.

The wheel has the recipes in ``virt_sse/lab/vm-images``, see :mod:`virt_sse.lab.build_recipes`.

A recipe is a folder with an executable ``build``; its argument is the folder to build the guest in. The
result is cached under a hash of the recipe, so a changed recipe is built again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import LabError, LabUnavailableError
from virt_sse.lab import cache
from virt_sse.lab.limits import run_limited
from virt_sse.lab.requirements import require

BOOT_SECTOR_TEXT = b"virt-sse boot-sector marker: not to be found in the raw image. "
"""Text in the image of boot-sector; the guest also writes copies of this text from sector 1000 on."""

_BUILD_SECONDS = 900.0
"""A build may download packages."""

_TOOLS = {
    "boot-sector": ("as", "ld"),
    "linux-micro": ("apt-get", "dpkg", "busybox", "cpio"),
    "guest-agent": ("apt-get", "dpkg", "ldd", "cpio"),
}


@dataclass(frozen=True, slots=True)
class LinuxMicro:
    """A kernel, and an initramfs to run the script on the kernel's command line (``sse.script=BASE64``)."""

    kernel: Path
    initramfs: Path


def boot_sector_image(*, stays: bool = False) -> Path:
    """The boot-sector guest: a raw image of 1 MiB, to be copied or imported but not written.

    :param stays: whether the guest, when done, keeps running in the halted state. By default, it powers off.
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


def linux_micro_with_agent(folder: Path) -> LinuxMicro:
    """The linux-micro guest with QEMU's guest agent, ``qemu-ga``, which the script starts.

    :param folder: gets the initramfs.
    :raise LabUnavailableError: When ``vm-images/`` or a tool to build it is missing.
    :raise LabError: When a recipe fails.
    """
    linux, agent = linux_micro(), built("guest-agent") / "agent.cpio"
    path = folder / "initramfs-agent.cpio"
    path.write_bytes(linux.initramfs.read_bytes() + agent.read_bytes())
    return LinuxMicro(linux.kernel, path)


def vm_images() -> Path:
    """The folder of the recipes: ``VIRT_SSE_VM_IMAGES``, or that of the installed package or the checkout.

    :raise LabUnavailableError: When the folder does not exist.
    """
    chosen = os.environ.get("VIRT_SSE_VM_IMAGES")
    here = Path(__file__).resolve()
    folders = [Path(chosen)] if chosen else [here.with_name("vm-images"), here.parents[3] / "vm-images"]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise LabUnavailableError(
        f"the guests' recipes are not in {folders[0]}",
        hint="install virt-sse from a wheel, or set VIRT_SSE_VM_IMAGES to the vm-images folder of a checkout",
    )


def built(name: str) -> Path:
    """The folder with the result of the recipe *name*; built unless cached.

    :raise LabUnavailableError: When the recipe or a required tool is missing.
    :raise LabError: When the recipe fails; a note contains the end of its output.
    """
    recipe = vm_images() / name
    if not (recipe / "build").is_file():
        raise LabUnavailableError(f"recipe {recipe}/build does not exist")
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
    """Build in a folder beside *result* and rename: *result* is complete or absent."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{recipe.name}-", dir=result.parent))
    try:
        status, said = run_limited([recipe / "build", temporary], f"{recipe}/build", _BUILD_SECONDS)
        if status != 0:
            lines = said.strip().splitlines() or ["nothing said"]
            error = LabError(f"{recipe}/build exited {status}: {lines[-1]}")
            error.add_note("\n".join(lines[-20:]))
            raise error
        temporary.rename(result)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

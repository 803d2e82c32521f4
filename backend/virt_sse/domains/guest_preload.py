"""Code that a domain's QEMU loads because of its environment: virt-sse's XTS library, and foreign libraries.

QEMU holds keys, and preloaded code sees the keys. :func:`refuse_unsafe` is applied before QEMU gets a key.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from virt_sse.errors import PolicyError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.libvirt.qemu_environment import LoadedCode
from virt_sse.system.acceleration import LIBRARY
from virt_sse.system.guest_library import GuestLibrary, LibraryInUse
from virt_sse.system.permissions import LoosePermission, loose_folder_permission, loose_permission


def is_accelerated(library: GuestLibrary, definition: DomainDefinition) -> bool:
    """Whether the definition asks for the XTS library in the domain's QEMU."""
    return any(each.name == str(library.path) for each in definition.loaded_code)


def foreign(library: GuestLibrary, code: Iterable[LoadedCode]) -> list[LoadedCode]:
    """The part of *code* that is not virt-sse's library."""
    return [each for each in dict.fromkeys(code) if each.name != str(library.path)]


def library_problem(found: LibraryInUse, *, is_asked: bool) -> str | None:
    """The difference between the definition and the running QEMU, in words; ``None`` without a difference."""
    if found is LibraryInUse.UNKNOWN:
        return f"the domain's QEMU runs with a library named {LIBRARY.name} that virt-sse has not installed"
    if is_asked and found is LibraryInUse.ABSENT:
        return "acceleration is on, but the domain's QEMU runs without the library"
    if is_asked and found is LibraryInUse.INEFFECTIVE:
        return "acceleration is on without effect: the domain's QEMU does not use nettle"
    return None


def refuse_unsafe(library: GuestLibrary, definition: DomainDefinition) -> None:
    """Refuse a domain whose QEMU would load code that another user may change.

    A missing file is not refused: the dynamic linker only warns about a missing library. virt-sse's library
    must be a version that virt-sse has installed.

    :raise PolicyError: When a file or folder is not safe.
    """
    for each in definition.loaded_code:
        path = Path("/", each.name)  # QEMU's working folder
        if "/" in each.name and (loose := _loose(path)):
            raise PolicyError(f"the domain's QEMU would load {each}: {loose.problem}", hint=loose.remedy)
        if path == library.path and path.exists() and (reason := library.obstacle()):
            raise PolicyError(
                f"the domain's QEMU would load {each}: {reason}",
                hint="'virt-sse host init --accelerate' installs the library again",
            )


def _loose(path: Path) -> LoosePermission | None:
    """A permission for others to change or create the file at *path*, or the files in the folder at *path*.

    :raise PolicyError: When a folder cannot be read.
    """
    try:
        path = path.resolve()
        while not path.exists():
            path = path.parent
        if path.is_dir():
            return loose_folder_permission(path)
        return loose_permission(path, path.stat()) or loose_folder_permission(path.parent)
    except (OSError, RuntimeError) as exc:
        raise PolicyError(f"cannot see who may change {path}, which the domain's QEMU would load") from exc

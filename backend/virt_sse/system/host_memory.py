"""Guest memory on a host's disks: swap spaces and the settings in libvirt's ``qemu.conf``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from virt_sse.errors import ConfigError

_SWAPS, _BLOCK_DEVICES = Path("/proc/swaps"), Path("/sys/class/block")
_SETTING = re.compile(r"\s*([a-z_]+)\s*=\s*(?:\"([^\"]*)\"|(-?\d+))")
_MEMORY_DIRECTORY = "/var/lib/libvirt/qemu/ram"


@dataclass(frozen=True, slots=True)
class QemuSettings:
    """Settings of ``qemu.conf`` for guest memory, with libvirt's defaults.

    :ivar dump_guest_core: whether a core dump of QEMU includes the guest's memory.
    :ivar memory_directory: folder of memory backing files, for domains with file-backed memory.
    """

    dump_guest_core: bool = False
    memory_directory: str = _MEMORY_DIRECTORY

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file *path*; a missing file means defaults.

        :raise ConfigError: When the file cannot be read.
        """
        try:
            lines = path.read_text("utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            lines = []
        except OSError as exc:
            raise ConfigError(f"cannot read {path}: {exc.strerror}") from exc
        found = {match[1]: match[2] or match[3] for line in lines if (match := _SETTING.match(line))}
        return cls(
            dump_guest_core=found.get("dump_guest_core", "0") != "0",
            memory_directory=found.get("memory_backing_dir") or _MEMORY_DIRECTORY,
        )


def plain_swaps(swaps: Path = _SWAPS, devices: Path = _BLOCK_DEVICES) -> list[str]:
    """The unencrypted swap spaces of this host, by their names in ``/proc/swaps``.

    Not included are dm-crypt devices (``dm/uuid`` begins with ``CRYPT-``) and zram devices without a backing
    device, which are memory. A swap file counts as unencrypted, even on an encrypted file system.

    :raise ConfigError: When ``/proc/swaps`` cannot be read.
    """
    try:
        lines = swaps.read_text("utf-8", errors="replace").splitlines()[1:]
    except FileNotFoundError:  # a kernel without swap
        return []
    except OSError as exc:
        raise ConfigError(f"cannot read {swaps}: {exc.strerror}") from exc
    names = [_unescaped(line.split()[0]) for line in lines if line.strip()]
    return [name for name in names if not _is_safe(name, devices)]


def _unescaped(name: str) -> str:
    """Replace the kernel's octal escapes in a name, e.g. ``\\040`` for a space."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _is_safe(name: str, devices: Path) -> bool:
    device = devices / os.path.basename(os.path.realpath(name))  # noqa: PTH119 -- /dev/mapper has links
    if _content(device / "dm/uuid").startswith("CRYPT-"):
        return True
    return device.name.startswith("zram") and _content(device / "backing_dev") in ("", "none")


def _content(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()
    except OSError:
        return ""

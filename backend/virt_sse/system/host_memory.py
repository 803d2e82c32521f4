"""Where a host puts its guests' memory: swap space, and what libvirt's ``qemu.conf`` says of it."""

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
    """What libvirt does with guests' memory, by ``qemu.conf``; its defaults where that says nothing.

    :ivar dump_guest_core: whether a core dump of QEMU holds the guest's memory.
    :ivar memory_directory: where the files lie that hold guests' memory, if a domain wants it in one.
    """

    dump_guest_core: bool = False
    memory_directory: str = _MEMORY_DIRECTORY

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read *path*, if it is there.

        :raise ConfigError: When it cannot be read.
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
    """The swap spaces of this host in which memory lies in plaintext, by their names in ``/proc/swaps``.

    Not: dm-crypt (its device's ``dm/uuid`` begins with ``CRYPT-``), and zram, which is memory, without a
    backing device. A file is as its file system is, which may be on an encrypted device; that is not looked
    for.

    :raise ConfigError: When the kernel does not say.
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
    """The kernel writes blanks in names as ``\\040``."""
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

"""Loop devices: block devices over files."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import require
from virt_sse.lab.guests import disk_xml


@contextlib.contextmanager
def loop_device(path: Path) -> Iterator[Path]:
    """A block device over a file, during the block."""
    require("losetup")
    made = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    try:
        yield Path(made.stdout.strip())
    finally:
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)


def grow(device: Path, below: Path, size: int) -> None:
    """Grow a device of :func:`loop_device`, as ``lvextend`` grows a volume."""
    with below.open("r+b") as file:
        file.truncate(size)
    subprocess.run(["losetup", "--set-capacity", device], check=True)


def block_disk(device: Path, target: str = "vda") -> str:
    """The ``<disk>`` element of a block device."""
    return disk_xml(device, target=target).replace("type='file'", "type='block'").replace("file=", "dev=")

"""Facts about the machine of a measurement."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

from virt_sse.errors import LabError
from virt_sse.lab import acceleration


def facts(scratch: Path) -> dict[str, object]:
    """Processor, versions, acceleration of guests, and the machine's load before the run."""
    return {
        "cpu": _first(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "kernel": platform.release(),
        "file_system": _said("stat", "--file-system", "--format=%T", str(scratch)),
        "python": platform.python_version(),
        "qemu": _first(r"version (\S+)", _said("qemu-img", "--version")),
        "libvirt": _first(r"(\d\S+)", _said("virsh", "--version")),
        "fio": _first(r"fio-(\S+)", _said("fio", "--version")),
        "acceleration": _acceleration(),
    }


def _acceleration() -> str:
    try:
        return str(acceleration.probe("boot-sector", slow_kvm=True))
    except LabError as exc:
        return str(exc)


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found[1].strip() if found else "unknown"

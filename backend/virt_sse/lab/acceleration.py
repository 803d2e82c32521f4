"""Probe of each guest's support for KVM on this machine.

The presence of ``/dev/kvm`` proves nothing: a KVM that emulates runs a BIOS guest ten times slower than TCG,
and hangs on a Linux kernel. Therefore each guest is probed once, in a separate QEMU, and the result is cached
until a reboot or a change of QEMU.
"""

from __future__ import annotations

import json
import os
import platform
import selectors
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from virt_sse.errors import LabError
from virt_sse.lab import cache, recipes
from virt_sse.lab.limits import run_limited
from virt_sse.lab.requirements import require

GuestName = Literal["boot-sector", "linux-micro"]
DomainType = Literal["kvm", "qemu"]

_SILENCE = {"boot-sector": 40.0, "linux-micro": 6.0}
"""Time limit in seconds for each silence on a guest's console.

Under a working KVM, guests print several times per second. Under a KVM that emulates, a BIOS may need seconds
until its first output, and a Linux kernel would need hours.
"""

_TIME_LIMIT = 60.0

_FAST_SECONDS = 1.5
"""A guest that boots in this time under KVM is not booted under TCG for comparison."""
_MUCH_FASTER = 3


@dataclass(frozen=True, slots=True)
class Acceleration:
    """Acceleration of a guest on this machine.

    :ivar domain_type: the ``type`` of its ``<domain>``; ``qemu`` is emulation (TCG).
    :ivar reason: reason for not using KVM, e.g. that TCG is faster; empty for KVM.
    """

    guest: GuestName
    domain_type: DomainType
    reason: str = ""

    def __str__(self) -> str:
        if self.domain_type == "kvm":
            return f"{self.guest}: kvm"
        return f"{self.guest}: qemu (TCG), because {self.reason}"


def probe(guest: GuestName, *, slow_kvm: bool = False) -> Acceleration:
    """Probe the acceleration of *guest*, or return the cached result. A probe may take about ten seconds.

    :param slow_kvm: choose KVM wherever KVM runs the guest; by default, not where TCG is much faster.
    :raise LabUnavailableError: When QEMU or a tool for building the guest is missing.
    :raise LabError: When the guest cannot be built.
    """
    require("qemu-system-x86_64", "setpriv")
    path = cache.cache_directory() / f"accelerations-{guest}.json"
    machine = _machine()
    with cache.locked(f"acceleration-{guest}"):
        known = _read(path)
        if known.get("machine") != machine:
            known = {"machine": machine, "broken": "", "slow": "", **_tried(guest)}
            cache.replace(path, json.dumps(known).encode())
    reason = known["broken"] or ("" if slow_kvm else known["slow"])
    return Acceleration(guest, "qemu" if reason else "kvm", reason)


def _machine() -> str:
    """Key of the cached results: all facts which influence a probe."""
    _, qemu = run_limited(["qemu-system-x86_64", "--version"], "qemu-system-x86_64 --version", _TIME_LIMIT)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {platform.release()} {qemu.splitlines()[0]} kvm={Path('/dev/kvm').exists()}"


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _tried(guest: GuestName) -> dict[str, str]:
    """The reason why KVM does not run *guest*, as ``broken``, or runs it slower than TCG, as ``slow``."""
    if not Path("/dev/kvm").exists():
        return {"broken": "/dev/kvm does not exist"}
    try:
        seconds = _boot(guest, "kvm")
        if seconds < _FAST_SECONDS or seconds < _MUCH_FASTER * (emulated := _boot(guest, "tcg")):
            return {}
    except LabError as exc:
        return {"broken": str(exc)}
    return {"slow": f"under KVM it takes {seconds:.1f} s instead of {emulated:.1f} s"}


def _boot(guest: GuestName, accelerator: str) -> float:
    """Run *guest* to its end: the seconds it took.

    :raise LabError: When the guest does not come to its end.
    """
    if guest == "boot-sector":
        disk = f"file={recipes.boot_sector_image()},format=raw,if=virtio,snapshot=on"
        return _watch(accelerator, ("-drive", disk), "boot-sector: done", _SILENCE[guest])
    linux = recipes.linux_micro()
    # Without "quiet" and with an early console: the probe relies on continuous output.
    command_line = "console=ttyS0 earlyprintk=ttyS0 sse.script=Og=="  # ":"
    arguments = ("-kernel", linux.kernel, "-initrd", linux.initramfs, "-append", command_line)
    return _watch(accelerator, arguments, "linux-micro: exit 0", _SILENCE[guest])


def _watch(accelerator: str, arguments: Sequence[str | Path], expected: str, silence: float) -> float:
    """Run QEMU until it prints *expected*: the seconds it took.

    :raise LabError: When QEMU ends, or says nothing for *silence* seconds.
    """
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", accelerator),
            *("-machine", "pc", "-nodefaults", "-no-user-config", "-display", "none", "-m", "96"),
            *("-serial", "stdio", *arguments),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = cast("IO[bytes]", process.stdout)
    said, last = b"", time.monotonic()
    began = last
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(output, selectors.EVENT_READ)
            while (now := time.monotonic()) - began < _TIME_LIMIT:
                if not selector.select(last + silence - now):
                    raise LabError(f"under {accelerator.upper()} its output stops{_after(said)}")
                chunk = os.read(output.fileno(), 65536)
                if not chunk:
                    raise LabError(f"QEMU with {accelerator.upper()} ended{_after(said)}")
                said, last = said + chunk, time.monotonic()
                if expected.encode() in said:
                    return last - began
    finally:
        process.kill()
        process.wait()
        output.close()
    raise LabError(f"under {accelerator.upper()} it did not finish within {_TIME_LIMIT:.0f} s")


def _after(said: bytes) -> str:
    lines = said.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" after {last[:60]!r}" if last else ""

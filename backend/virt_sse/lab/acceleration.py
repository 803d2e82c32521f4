"""Which guest can run under KVM on this machine.

Having ``/dev/kvm`` does not say so: there are KVMs that run a BIOS guest and hang on a Linux kernel. So each
guest is tried once, in a QEMU of its own, and the answer kept until the machine restarts or QEMU changes.
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

from virt_sse.lab import cache, recipes
from virt_sse.lab.requirements import require

GuestName = Literal["boot-sector", "linux-micro"]
DomainType = Literal["kvm", "qemu"]

_SILENCE = {"boot-sector": 20.0, "linux-micro": 6.0}
"""For how many seconds a guest may say nothing. A working KVM makes it speak several times a second; a BIOS
in an emulating one can take seconds to its first word, a Linux kernel would take hours."""

_TIME_LIMIT = 60.0


@dataclass(frozen=True, slots=True)
class Acceleration:
    """How a guest runs here.

    :ivar domain_type: the ``type`` of its ``<domain>``; ``qemu`` is emulation (TCG).
    :ivar reason: why it is not KVM; empty when it is.
    """

    guest: GuestName
    domain_type: DomainType
    reason: str = ""

    def __str__(self) -> str:
        if self.domain_type == "kvm":
            return f"{self.guest}: kvm"
        return f"{self.guest}: qemu (TCG), because {self.reason}"


def probe(guest: GuestName) -> Acceleration:
    """Find out, or remember, how *guest* runs on this machine. The first time takes up to some ten seconds.

    :raise LabUnavailableError: When QEMU or what the guest is built with is missing.
    :raise LabError: When the guest cannot be built.
    """
    require("qemu-system-x86_64", "setpriv")
    path = cache.cache_directory() / f"acceleration-{guest}.json"
    machine = _machine()
    with cache.locked(f"acceleration-{guest}"):
        known = _read(path)
        if known.get("machine") != machine:
            reason = _try_kvm(guest)
            known = {"machine": machine, "reason": reason}
            cache.replace(path, json.dumps(known).encode())
    reason = known.get("reason", "")
    return Acceleration(guest, "qemu" if reason else "kvm", reason)


def _machine() -> str:
    """What the answer depends on."""
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {platform.release()} {qemu.stdout.splitlines()[0]} kvm={Path('/dev/kvm').exists()}"


def _read(path: Path) -> dict[str, str]:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _try_kvm(guest: GuestName) -> str:
    """Run *guest* under KVM; why that does not work, or nothing when it does."""
    if not Path("/dev/kvm").exists():
        return "there is no /dev/kvm"
    if guest == "boot-sector":
        disk = f"file={recipes.boot_sector_image()},format=raw,if=virtio,snapshot=on"
        return _watch(("-drive", disk), "boot-sector: done", _SILENCE[guest])
    linux = recipes.linux_micro()
    # Without "quiet" and with an early console, since it is judged by whether it speaks.
    command_line = "console=ttyS0 earlyprintk=ttyS0 sse.script=Og=="  # ":"
    arguments = ("-kernel", linux.kernel, "-initrd", linux.initramfs, "-append", command_line)
    return _watch(arguments, "linux-micro: exit 0", _SILENCE[guest])


def _watch(arguments: Sequence[str | Path], expected: str, silence: float) -> str:
    """Run QEMU until it prints *expected*, ends, or says nothing for *silence* seconds."""
    process = subprocess.Popen(
        [
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-accel", "kvm", "-machine", "pc"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-m", "96", "-serial", "stdio"),
            *arguments,
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
                    return f"under KVM it says nothing more{_after(said)}"
                chunk = os.read(output.fileno(), 65536)
                if not chunk:
                    return f"QEMU with KVM ended{_after(said)}"
                said, last = said + chunk, time.monotonic()
                if expected.encode() in said:
                    return ""
    finally:
        process.kill()
        process.wait()
        output.close()
    return f"under KVM it was not done in {_TIME_LIMIT:.0f} s"


def _after(said: bytes) -> str:
    lines = said.decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" after {last[:60]!r}" if last else ""

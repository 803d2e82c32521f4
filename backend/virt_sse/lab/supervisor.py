"""The first process of a lab host: arranges its mounts, then outlives nothing.

Run as a script by :class:`virt_sse.lab.host.LabHost`, as process 1 of new mount, UTS and PID namespaces;
standard library only. Says ``ready`` on its standard output. When its owner ends, whatever way, or
something arrives on its standard input, it exits; the kernel then kills every process of the namespace.
"""

from __future__ import annotations

import grp
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

BINDS = ("etc/libvirt", "var/lib/libvirt", "var/log/libvirt", "var/cache/libvirt", "run")
"""What a lab host has of its own. All of /run, so that libvirt meets neither D-Bus nor systemd nor locks."""

TPM_AUTHORITY = "var/lib/swtpm-localca"
"""What signs emulated TPMs' certificates; there only where swtpm is installed."""

KVM = Path("/dev/kvm")


def run(*argv: str | Path) -> None:
    """Run a command; when it fails, end with the first line of what it said."""
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = result.stderr.strip() or f"{argv[0]} exited {result.returncode}"
        sys.exit(said.splitlines()[0])  # mount goes on with general advice


def mount(*arguments: str | Path) -> None:
    run("mount", *arguments)


def bring_kvm(directory: Path) -> None:
    """Put a /dev/kvm that group kvm may use over the machine's own, as udev sets it on an ordinary host."""
    if not KVM.exists():
        return
    mount("-t", "tmpfs", "-o", "mode=0755,size=64k", "lab", directory)
    node = directory / "kvm"
    os.mknod(node, stat.S_IFCHR | 0o600, KVM.stat().st_rdev)
    os.chown(node, 0, grp.getgrnam("kvm").gr_gid)
    node.chmod(0o660)
    mount("--bind", node, KVM)


def arrange(directory: Path, hostname: str) -> None:
    socket.sethostname(hostname)
    # Without a mounted hierarchy libvirt leaves control groups alone; they are the machine's.
    if Path("/sys/fs/cgroup").is_mount():
        run("umount", "--recursive", "--lazy", "/sys/fs/cgroup")
    bring_kvm(directory / "dev")
    for name in (*BINDS, *([TPM_AUTHORITY] if (directory / TPM_AUTHORITY).exists() else [])):
        mount("--bind", directory / name, Path("/") / name)


def main() -> None:
    """Arguments: the lab host's directory, its hostname, the number of a pidfd of its owner."""
    directory, hostname, owner = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    arrange(directory, hostname)
    # Daemons' orphans end up here; ignoring the signal makes the kernel reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)  # noqa: T201 -- the owner waits for it
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    poll.poll()


if __name__ == "__main__":
    main()

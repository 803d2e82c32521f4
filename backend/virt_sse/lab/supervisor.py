"""The first process of a lab host: sets up the mounts, then waits for the owner's end.

Run as a script by :class:`virt_sse.lab.host.LabHost`, as process 1 of new mount, UTS and PID namespaces;
standard library only. Prints ``ready`` on standard output. Exits when the owner ends, in any way, or when
data arrives on standard input; the kernel then kills every process of the namespace.
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
"""Directories private to a lab host; all of /run, to hide D-Bus, systemd and locks from libvirt."""

TPM_AUTHORITY = "var/lib/swtpm-localca"
"""State of the local CA for certificates of emulated TPMs; exists only if swtpm is installed."""

KVM = Path("/dev/kvm")


def run(*argv: str | Path) -> None:
    """Run a command; on failure, exit with the first line of its output."""
    result = subprocess.run(argv, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        said = result.stderr.strip() or f"{argv[0]} exited {result.returncode}"
        sys.exit(said.splitlines()[0])  # mount's further lines are general advice


def mount(*arguments: str | Path) -> None:
    run("mount", *arguments)


def bring_kvm(directory: Path) -> None:
    """Mount a /dev/kvm usable by group kvm over the machine's own, with udev's usual permissions."""
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
    # Control groups belong to the machine. Without a mounted hierarchy, libvirt does not use them.
    if Path("/sys/fs/cgroup").is_mount():
        run("umount", "--recursive", "--lazy", "/sys/fs/cgroup")
    bring_kvm(directory / "dev")
    for name in (*BINDS, *([TPM_AUTHORITY] if (directory / TPM_AUTHORITY).exists() else [])):
        mount("--bind", directory / name, Path("/") / name)


def main() -> None:
    """Supervise; arguments: the lab host's directory, its hostname, the number of the owner's pidfd."""
    directory, hostname, owner = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    arrange(directory, hostname)
    # Orphans of daemons become children of this process; ignoring the signal makes the kernel reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)  # noqa: T201 -- the owner waits for this line
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(sys.stdin, select.POLLIN)
    poll.poll()


if __name__ == "__main__":
    main()

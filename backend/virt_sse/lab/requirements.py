"""What the lab needs from the machine, and which package brings it."""

from __future__ import annotations

import os
import shutil

from virt_sse.errors import LabUnavailableError

PACKAGES = {
    "apt-get": "apt",
    "as": "binutils",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "dpkg": "dpkg",
    "ld": "binutils",
    "libvirtd": "libvirt-daemon-system",
    "mount": "mount",
    "nsenter": "util-linux",
    "qemu-system-x86_64": "qemu-system-x86",
    "setpriv": "util-linux",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "umount": "mount",
    "unshare": "util-linux",
    "virsh": "libvirt-clients",
    "virtlogd": "libvirt-daemon-system",
}
"""Every tool the lab runs, with the Debian and Ubuntu package it comes from."""

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""libvirtd lies in /usr/sbin, which an operator's PATH need not hold."""


def require(*tools: str) -> None:
    """Make sure that all *tools* are installed.

    :raise LabUnavailableError: When some are not; names each, and the packages to install.
    """
    missing = [tool for tool in tools if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        packages = sorted({PACKAGES[tool] for tool in missing})
        raise LabUnavailableError(
            f"the lab needs {', '.join(missing)}", hint=f"apt-get install {' '.join(packages)}"
        )


def require_root() -> None:
    """:raise LabUnavailableError: When this process is not root's."""
    if os.geteuid() != 0:
        raise LabUnavailableError("the lab needs root: it mounts, and starts libvirtd")

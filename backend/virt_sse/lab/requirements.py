"""Tools required by the lab, and the packages to install for them."""

from __future__ import annotations

import os
import shutil

from virt_sse.errors import LabUnavailableError

PACKAGES = {
    "apt-get": "apt",
    "as": "binutils",
    "bwrap": "bubblewrap",
    "busybox": "busybox-static",
    "ceph": "ceph-common",
    "ceph-authtool": "ceph-common",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "cpio": "cpio",
    "dpkg": "dpkg",
    "ld": "binutils",
    "libvirtd": "libvirt-daemon-system",
    "monmaptool": "ceph-base",
    "mount": "mount",
    "nsenter": "util-linux",
    "qemu-system-x86_64": "qemu-system-x86",
    "rbd": "ceph-common",
    "setpriv": "util-linux",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "umount": "mount",
    "unshare": "util-linux",
    "virsh": "libvirt-clients",
    "virtlogd": "libvirt-daemon-system",
}
"""Every tool used by the lab, with its package in Debian and Ubuntu."""

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""PATH with the sbin directories: libvirtd is in /usr/sbin, often missing from an operator's PATH."""


def require(*tools: str) -> None:
    """Check that all *tools* are installed.

    :raise LabUnavailableError: When tools are missing; names each, and the packages to install.
    """
    missing = [tool for tool in tools if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        packages = sorted({PACKAGES[tool] for tool in missing})
        raise LabUnavailableError(
            f"the lab needs {', '.join(missing)}", hint=f"apt-get install {' '.join(packages)}"
        )


def require_root() -> None:
    """Check for root privileges.

    :raise LabUnavailableError: When this process does not run as root.
    """
    if os.geteuid() != 0:
        raise LabUnavailableError("the lab needs root, to mount and to start libvirtd")

"""Confinement of tools that parse images, by bubblewrap (bwrap(1)), setpriv(1) and prlimit(1).

Storage and guests write images, and so control a parser with a fault. A confined tool

- sees the programs and libraries of ``/usr``, read-only, an empty network (for images in Ceph: the host's),
  its own processes, and the files of its :class:`Confinement`. Each file is bound by a descriptor: another
  file under the same name is not reachable.
- runs as :data:`TOOL_ID`, a user without files or processes. Images belong to root or to QEMU's user,
  therefore the tool keeps CAP_DAC_OVERRIDE, which the mounts restrict to the bound files. A network file
  system does not know this capability: for an image there, the tool runs as root, without other capabilities.
  CAP_DAC_READ_SEARCH would be worse: open_by_handle_at(2) then finds every file of a mounted filesystem.
- has limits of memory, processor time and length of files, and leaves no core.

bwrap runs in a PID namespace (:func:`~virt_sse.system.leash.leashed`). Otherwise a killed bwrap could leave a
child that is blocked for ever, with the descriptors of the images.

Without root's rights, user and capabilities stay as they are; the mounts are as for root where the kernel
allows unprivileged user namespaces, and else the host's.
"""

from __future__ import annotations

import functools
import os
import shutil
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from virt_sse.errors import ToolError
from virt_sse.system import acceleration
from virt_sse.system.file_systems import is_on_network
from virt_sse.system.leash import namespace
from virt_sse.system.rbd_names import is_rbd

TOOL_ID = 65533
"""User and group of confined tools: outside of the ranges of distributions, systemd and ``storage_user``."""
_OPEN_FILES = 256
_MOST_WRITTEN = 1 << 20
"""Bound for a tool that only reads; standard error may be a file in memory."""
_CAPABILITY = "dac_override"
_FOR_SETPRIV = ("CAP_DAC_OVERRIDE", "CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP")
_SYSTEM = (
    *("--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"),
    *("--symlink", "usr/lib64", "/lib64", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"),
    *("--proc", "/proc", "--dev", "/dev"),
)
_NAMESPACES = ("--unshare-ipc", "--unshare-pid")
_NO_NETWORK = ("--unshare-net",)
RESOLVER = tuple(map(Path, ("/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/host.conf")))
"""What a program reads to find a host by name."""
_READ_ONLY = ("--remount-ro", "/proc", "--remount-ro", "/dev", "--remount-ro", "/")


@dataclass(frozen=True, slots=True)
class BoundFile:
    """A file or block device that a confined tool can open.

    :ivar path: name for the tool, and in its messages.
        The name of an RBD image stands for the network: the image itself is not bound.
    :ivar descriptor: open descriptor of the file, also ``O_PATH``; the file must have a name.
    :ivar writable: allow writing. A block device is always writable: the kernel has no read-only view of one.
    """

    path: Path
    descriptor: int
    writable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Confinement:
    """The files that a tool can open, and its limits.

    :ivar memory: address space in bytes (``RLIMIT_AS``).
    :ivar cpu_seconds: processor time (``RLIMIT_CPU``); ``None`` for a tool whose work has no bound.
    :ivar written: largest length of a file that the tool writes, in bytes (``RLIMIT_FSIZE``).
    :ivar network: whether the tool reaches the host's network, for images in Ceph.
    """

    files: Sequence[BoundFile] = field(default=())
    memory: int = 2 << 30
    cpu_seconds: int | None = 60
    written: int = _MOST_WRITTEN
    network: bool = False

    @property
    def has_network(self) -> bool:
        """Whether the tool reaches the network."""
        return self.network or any(is_rbd(file.path) for file in self.files)

    @property
    def descriptors(self) -> list[int]:
        """The descriptors to pass to :func:`command`'s process."""
        return [file.descriptor for file in self.files]


def has_mounts() -> bool:
    """Whether :func:`command` runs a tool in namespaces; an ordinary user may lack the right to make some."""
    return os.geteuid() == 0 or _works_unprivileged()


def command(arguments: Sequence[str], confinement: Confinement, opened: Sequence[int] = ()) -> list[str]:
    """The command that runs the tool *arguments* confined, as first process of a PID namespace.

    :param opened: further descriptors of files that the tool opens, by their number.
    :raise ToolError: When the tool or bubblewrap is not installed.
    """
    found = shutil.which(arguments[0])
    if found is None:
        raise ToolError(f"{arguments[0]} is not installed")
    tool = os.path.realpath(found)
    limited = [
        *("prlimit", f"--as={confinement.memory}", f"--fsize={max(confinement.written, _MOST_WRITTEN)}"),
        *("--core=0", f"--nofile={_OPEN_FILES}"),
        *(
            []
            if confinement.cpu_seconds is None
            else [f"--cpu={confinement.cpu_seconds}:{confinement.cpu_seconds + 1}"]
        ),  # SIGXCPU, then SIGKILL
    ]
    if not has_mounts():
        return [*limited, "setpriv", "--no-new-privs", "--", *arguments]
    if shutil.which("bwrap") is None:
        raise ToolError("bwrap is not installed", hint="install the package bubblewrap")
    binds = [
        part for file in confinement.files if not is_rbd(file.path) for part in _bind(file)
    ] + _accelerate(tool)
    if not Path(tool).is_relative_to("/usr"):
        binds += ["--ro-bind", tool, tool]
    network: tuple[str, ...] = _NO_NETWORK
    if confinement.has_network:
        network = tuple(part for file in map(str, RESOLVER) for part in ("--ro-bind-try", file, file))
    confined = [
        "bwrap",
        *_NAMESPACES,
        *_SYSTEM,
        *network,
        *binds,
        *_READ_ONLY,
        "--cap-drop",
        "ALL",
    ]
    if os.geteuid() != 0:
        return [*limited, *confined, "--", tool, *arguments[1:]]
    only = f"-all,+{_CAPABILITY}"
    user = 0 if any(map(is_on_network, (*confinement.descriptors, *opened))) else TOOL_ID
    unprivileged = [
        *("/usr/bin/setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--no-new-privs"),
        *(f"--inh-caps={only}", f"--ambient-caps={only}", f"--bounding-set={only}", "--"),
    ]
    kept = [part for capability in _FOR_SETPRIV for part in ("--cap-add", capability)]
    return [*limited, *confined, *kept, "--", *unprivileged, tool, *arguments[1:]]


def tool_environment() -> dict[str, str]:
    """The environment of a confined tool: English messages, because virt-sse parses some."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}


def _accelerate(tool: str) -> list[str]:
    """Options of bwrap for a faster XTS in QEMU's tools; not for bwrap itself."""
    if not os.path.basename(tool).startswith("qemu-"):  # noqa: PTH119 -- a string as all options
        return []
    library = acceleration.library()
    options = ["--ro-bind", str(library), str(library)] if library else []
    for name, value in acceleration.environment().items():
        options += ["--setenv", name, value]
    return options


def _bind(file: BoundFile) -> list[str]:
    """Options of bwrap that make *file* appear under its path.

    bwrap refuses a bound file that is not the descriptor's. Such binds cannot be opened as devices; the
    descriptor's name of a device lies in ``/dev``, where root alone renames.
    """
    name = str(file.path.absolute())
    if stat.S_ISBLK(os.fstat(file.descriptor).st_mode):
        return ["--dev-bind", f"/proc/self/fd/{file.descriptor}", name]
    return ["--bind-fd" if file.writable else "--ro-bind-fd", str(file.descriptor), name]


@functools.cache
def _works_unprivileged() -> bool:
    """Whether this user can make namespaces: distributions restrict them."""
    trial = [*namespace(), "bwrap", *_NAMESPACES, *_NO_NETWORK, *_SYSTEM, "--", "/usr/bin/true"]
    try:
        return subprocess.run(trial, capture_output=True, check=False).returncode == 0
    except OSError:
        return False

"""The environment that makes QEMU's tools and storage processes encrypt faster.

QEMU built with nettle, as in Debian and Ubuntu, encrypts XTS block by block. ``libvirt_sse_xts.so``,
preloaded by ld.so(8), replaces nettle's XTS; the source is in ``backend/libvirt_sse_xts``. Processes without
nettle load the library without effect.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Mapping
from pathlib import Path

from virt_sse.errors import ToolError
from virt_sse.system.permissions import loose_folder_permission, loose_permission

LIBRARY = Path(__file__).with_name("libvirt_sse_xts.so")
_SECONDS = 20
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_ARENA_MAX": "8",
}
"""Settings of glibc's malloc (mallopt(3)).

QEMU takes a buffer of up to 1 MiB for each encrypted request. By default malloc takes such memory from the
kernel and gives the memory back each time. An arena grows by 64 MiB: the limit on arenas keeps a process with
64 threads below its memory limit.
"""


def library() -> Path | None:
    """The library to preload; ``None`` if :func:`obstacle` names a reason."""
    return None if obstacle(LIBRARY) else LIBRARY.resolve()


def obstacle(path: Path = LIBRARY) -> str | None:
    """The reason why the library at *path* must not or cannot be preloaded; ``None`` without such a reason.

    Storage processes have users of their own, who must be able to read the library.
    """
    try:
        path = path.resolve()
        status = path.stat()
        loose = loose_permission(path, status) or loose_folder_permission(path.parent)
        hidden = [each for each in path.parents if not each.stat().st_mode & stat.S_IXOTH]
    except FileNotFoundError:
        return "not built: no C compiler at installation, or no x86-64 processor"
    except OSError as exc:
        return f"cannot read {path}: {exc.strerror}"
    if loose:
        return f"{loose.problem}; {loose.remedy}"
    if hidden or not status.st_mode & stat.S_IROTH:
        return f"users of storage processes cannot read {hidden[-1] if hidden else path}"
    if re.search(r"[\s:]", str(path)):
        return f"the path {path} has a space or a colon, which LD_PRELOAD does not allow"
    return None


def path_in_qemu() -> str | None:
    """The library's path in qemu-img, such as ``vaes512``; ``None`` if the library leaves XTS to nettle.

    :raise ToolError: When qemu-img does not start, or does not load the library.
    """
    with os.fdopen(os.memfd_create("statistics"), "w+b") as file:
        statistics = {"VIRT_SSE_XTS_STATISTICS": f"/proc/self/fd/{file.fileno()}"}
        try:
            subprocess.run(
                ["qemu-img", "--version"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=[file.fileno()],
                timeout=_SECONDS,
                check=True,
                env={**os.environ, **environment(os.environ), **statistics},
            )
        except FileNotFoundError as exc:
            raise ToolError("qemu-img is not installed") from exc
        except subprocess.SubprocessError as exc:
            raise ToolError(f"qemu-img with {LIBRARY} failed: {exc}") from exc
        file.seek(0)
        path, *_ = file.read().decode().split() or [""]
    if not path:
        raise ToolError(f"qemu-img does not load {LIBRARY}")
    return None if path == "nettle" else path


def environment(inherited: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a QEMU process.

    :param inherited: the environment in which the process starts otherwise.
    """
    preloaded = library()
    if preloaded is None:
        return ALLOCATOR.copy()
    others = (inherited or {}).get("LD_PRELOAD")
    return {**ALLOCATOR, "LD_PRELOAD": f"{preloaded}:{others}" if others else str(preloaded)}

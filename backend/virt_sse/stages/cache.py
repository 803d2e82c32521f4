"""nbdkit(1) with its cache filter: a host cache of ciphertext, as it lies below the guest's LUKS node.

Its cache is a file without a name, gone with the process (nbdkit-cache-filter(1)).
"""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

from virt_sse.model.layers import HostCaching

_MODES = {HostCaching.READ_ONLY: "writethrough", HostCaching.READ_WRITE: "writeback"}


def arguments(caching: HostCaching, source: list[str]) -> list[str]:
    """The command line; the socket to serve is descriptor 3 (sd_listen_fds(3)).

    A flush of the guest's goes through to the source in either mode.

    :param source: of :func:`over_image` or :func:`over_export`.
    """
    options = [f"cache={_MODES[caching]}", "cache-on-read=true"]
    return ["nbdkit", "--foreground", "--filter=cache", *source, *options]


def over_image(path: Path) -> list[str]:
    """A cache over an image file."""
    return ["file", f"file={path}"]


def over_export(socket: Path, disk_id: UUID) -> list[str]:
    """A cache over what a storage daemon exports."""
    return ["nbd", f"socket={socket}", f"export={disk_id}"]

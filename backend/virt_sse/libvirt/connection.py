"""Connections to libvirt, and its errors by meaning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import libvirt

from virt_sse.errors import LibvirtError, LibvirtUnavailableError


@contextlib.contextmanager
def connected(uri: str) -> Iterator[libvirt.virConnect]:
    """A connection to the libvirt at *uri*, closed at the end.

    :raise LibvirtUnavailableError: When none answers.
    :raise LibvirtError: When a call made inside fails and is not caught there.
    """
    libvirt.registerErrorHandler(_say_nothing, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as exc:
        raise LibvirtUnavailableError(f"libvirt does not answer at {uri}: {exc}") from exc
    try:
        yield connection
    except libvirt.libvirtError as exc:
        raise LibvirtError(f"libvirt: {exc}") from exc
    finally:
        connection.close()


def _say_nothing(_context: object, _error: object) -> None:
    """Libvirt prints every error to the standard error unless it is told not to; ours are raised."""

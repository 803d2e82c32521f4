"""Connections to libvirt, with libvirt's errors raised as errors of virt-sse."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import libvirt

from virt_sse.errors import LibvirtError, LibvirtUnavailableError


@contextlib.contextmanager
def connected(uri: str) -> Iterator[libvirt.virConnect]:
    """Connect to the libvirt at *uri*; the connection is closed at the end of the block.

    :raise LibvirtUnavailableError: When libvirt does not answer.
    :raise LibvirtError: When a libvirt call in the block fails and the block does not catch the error.
    """
    libvirt.registerErrorHandler(_print_nothing, None)
    try:
        connection = libvirt.open(uri)
    except libvirt.libvirtError as exc:
        raise LibvirtUnavailableError(f"libvirt does not answer at {uri}: {exc}") from exc
    except ValueError as exc:  # not UTF-8, or with a zero byte
        raise LibvirtUnavailableError(f"invalid libvirt URI {ascii(uri)[:200]}") from exc
    try:
        yield connection
    except libvirt.libvirtError as exc:
        raise LibvirtError(f"libvirt: {exc}") from exc
    finally:
        connection.close()


def _print_nothing(_context: object, _error: object) -> None:
    """Replaces libvirt's default handler, which prints every error, raised or not, to standard error."""

"""A host's files under a folder, without libvirt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.command_line import no_libvirt
from virt_sse.backend import Backend
from virt_sse.host.setup import initialise


def host_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make *root* the host of this process; no libvirt answers there, not even this machine's."""
    (root / "var/lib/libvirt/images").mkdir(parents=True)
    monkeypatch.setenv("VIRT_SSE_ROOT", str(root))
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", no_libvirt(root))
    return root


@contextmanager
def initialised_backend(root: Path) -> Iterator[Backend]:
    """The backend of a new host under *root*, for fixtures that several tests share."""
    with pytest.MonkeyPatch.context() as monkeypatch, Backend.open(host_folder(root, monkeypatch)) as backend:
        initialise(backend.host)
        yield backend

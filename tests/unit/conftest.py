from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller's shell says of a root or of libvirt is not for unit tests."""
    monkeypatch.delenv("VIRT_SSE_ROOT", raising=False)
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)

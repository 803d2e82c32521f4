from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the root and the libvirt that the caller's environment names."""
    monkeypatch.delenv("VIRT_SSE_ROOT", raising=False)
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)

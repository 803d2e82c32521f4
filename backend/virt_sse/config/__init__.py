"""The configuration of a host."""

from __future__ import annotations

from virt_sse.config.config import Config

__all__ = ["Config"]

"""Keys in a PKCS#11 token: a SoftHSM, or by another module's path a hardware security module.

``uri``, ``pins``, ``module``, ``process``, ``worker`` and ``oaep`` import as they are; before anything else
of this package is, call :func:`require`.
"""

from __future__ import annotations

import importlib.util

from virt_sse.errors import ConfigError


def require() -> None:
    """:raise ConfigError: When PyKCS11 is not installed."""
    if importlib.util.find_spec("PyKCS11") is None:
        raise ConfigError(
            "keys in a token need the package PyKCS11, which is not installed",
            hint="pip install 'virt-sse[hsm]'",
        )

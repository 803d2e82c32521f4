"""Keys in a PKCS#11 token: SoftHSM, or a hardware security module through its own PKCS#11 module.

``uri``, ``pins``, ``module``, ``process``, ``worker`` and ``oaep`` import without PyKCS11. Call
:func:`require` before importing any other module of this package.
"""

from __future__ import annotations

import importlib.util

from virt_sse.errors import ConfigError


def require() -> None:
    """Check that the optional dependency of this package is installed.

    :raise ConfigError: When PyKCS11 is not installed.
    """
    if importlib.util.find_spec("PyKCS11") is None:
        raise ConfigError(
            "keys in a token need the package PyKCS11, and PyKCS11 is not installed",
            hint="pip install 'virt-sse[hsm]'",
        )

"""Packages of virt-sse's extras, and errors that name the extra to be installed."""

from __future__ import annotations

import traceback
from importlib.util import find_spec

from virt_sse.errors import ConfigError

_MODULES = {
    "azure": ("azure.identity", "azure.keyvault.keys", "jwt"),
    "hsm": ("PyKCS11",),
    "page": ("jinja2", "starlette", "uvicorn"),
    "postgresql": ("psycopg",),
    "vault": ("jwt", "starlette", "uvicorn"),
}


def require(extra: str, what: str) -> None:
    """Check that an extra is installed, without importing its packages.

    :param what: what needs the extra, e.g. ``the page``.
    :raise ConfigError: When a package is missing.
    """
    missing = [module for module in _MODULES[extra] if not _is_installed(module)]
    if missing:
        raise _error(extra, what, ", ".join(missing))


def extra_error(exc: ModuleNotFoundError) -> ConfigError | None:
    """The error for a failed import of an extra's package; ``None`` for any other module.

    Of several extras with the package, the one of the importing room of virt-sse.
    """
    package = (exc.name or "").partition(".")[0]
    extras = [
        extra
        for extra, modules in _MODULES.items()
        if package in {module.partition(".")[0] for module in modules}
    ]
    if not extras:
        return None
    importers = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(exc.__traceback__)]
    ours = (extra for extra in extras if any(each.startswith(f"virt_sse.{extra}.") for each in importers))
    return _error(next(ours, extras[0]), "this", package)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _error(extra: str, what: str, packages: str) -> ConfigError:
    return ConfigError(
        f"{what} needs {packages}, not installed",
        hint=f"pip install 'virt-sse[{extra}]' in virt-sse's environment",
    )

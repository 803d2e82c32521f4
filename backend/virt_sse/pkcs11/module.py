"""A PKCS#11 module, as loaded in its separate process."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from virt_sse.errors import ConfigError, KeyProviderUnavailableError
from virt_sse.pkcs11.pins import Logins

_CKF_OS_LOCKING_OK = 2
_CKR_OK = 0
_CKR_CRYPTOKI_ALREADY_INITIALIZED = 0x191
_FINALIZE, _INITIALIZE = 2, 1
"""Indices in CK_FUNCTION_LIST; the version is at index 0."""

_FOLDERS = (
    "/usr/lib/*/pkcs11",
    "/usr/lib/pkcs11",
    "/usr/lib64/pkcs11",
    "/usr/lib/softhsm",
    "/usr/lib/*/softhsm",
    "/usr/lib64/softhsm",
    "/usr/lib/*-linux-gnu",
    "/usr/lib64",
)


class _InitializeArguments(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS."""

    _fields_ = (
        ("create_mutex", ctypes.c_void_p),
        ("destroy_mutex", ctypes.c_void_p),
        ("lock_mutex", ctypes.c_void_p),
        ("unlock_mutex", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_char_p),
    )


class Module:
    """A PKCS#11 module, initialised at first use. Not thread-safe.

    :param path: absolute path of the module.
    :param reserved: content of ``pReserved``; NSS expects the location of its database there.
    :ivar generation: increases with each initialisation; sessions and handles of earlier generations are
        invalid.
    """

    def __init__(self, path: Path, reserved: str | None) -> None:
        self.path = path
        self.generation = 0
        self._reserved = reserved
        self._is_initialised = False
        self._library: Any = None
        self._functions: Any = None

    @property
    def library(self) -> Any:
        """PyKCS11's object for the initialised module.

        :raise KeyProviderUnavailableError: When the module cannot be loaded or initialised.
        """
        if not self._is_initialised:
            self._initialise()
        return self._library

    def restart(self) -> None:
        """Initialise the module again: some modules notice an inserted token only then.

        :raise KeyProviderUnavailableError: When initialisation fails; the next use tries again.
        """
        self._is_initialised = False
        self._initialise()

    def _initialise(self) -> None:
        self.generation += 1
        if self._functions is None:
            self._functions = self._function_list()
        result = self._call_initialise()
        if result == _CKR_CRYPTOKI_ALREADY_INITIALIZED and self._library is not None:
            ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(self._functions[_FINALIZE])(None)
            result = self._call_initialise()
        if result not in (_CKR_OK, _CKR_CRYPTOKI_ALREADY_INITIALIZED):
            raise KeyProviderUnavailableError(
                f"PKCS#11 module {self.path} cannot be initialised (0x{result:08X})"
            )
        if self._library is None:
            self._library = _library(self.path)
        self._is_initialised = True

    def _call_initialise(self) -> int:
        reserved = self._reserved.encode() if self._reserved is not None else None
        arguments = _InitializeArguments(flags=_CKF_OS_LOCKING_OK, reserved=reserved)
        function = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(self._functions[_INITIALIZE])
        return int(function(ctypes.byref(arguments)))

    def _function_list(self) -> Any:
        """Load the module by ctypes: PyKCS11 cannot pass ``pReserved``, nor initialise a module again."""
        try:
            library = ctypes.CDLL(str(self.path))
            functions = ctypes.POINTER(ctypes.c_void_p)()
            result = library.C_GetFunctionList(ctypes.byref(functions))
        except (OSError, AttributeError) as exc:
            raise KeyProviderUnavailableError(f"cannot load PKCS#11 module {self.path}: {exc}") from exc
        if result != _CKR_OK:
            raise KeyProviderUnavailableError(
                f"PKCS#11 module {self.path} returned no function list (0x{result:08X})"
            )
        return functions


def load(_logins: Logins, path: Path, reserved: str | None) -> Module:
    """Make a module; passed as *make* to :class:`~virt_sse.pkcs11.process.ModuleProcess`."""
    return Module(path, reserved)


def find_module(name: str) -> Path:
    """Find the module named by RFC 7512's ``module-name``.

    :raise ConfigError: When no module of this name is installed.
    """
    if "/" not in name:
        for folder in _FOLDERS:
            for file in (f"{name}.so", f"lib{name}.so"):
                for found in sorted(Path("/").glob(f"{folder[1:]}/{file}")):
                    return found
    raise ConfigError(f"no PKCS#11 module {name!r} is installed", hint="set 'module' to its path")


def _library(path: Path) -> Any:
    from PyKCS11 import PyKCS11Error, PyKCS11Lib

    try:
        return PyKCS11Lib().load(str(path))
    except PyKCS11Error as exc:
        raise KeyProviderUnavailableError(f"cannot load PKCS#11 module {path}: {exc}") from exc

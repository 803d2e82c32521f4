"""A PKCS#11 module in this process: loaded once, initialised once, and anew after a fork."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from virt_sse.errors import ConfigError, KeyProviderUnavailableError
from virt_sse.pkcs11 import require

_CKF_OS_LOCKING_OK = 2
_CKR_OK = 0
_CKR_CRYPTOKI_ALREADY_INITIALIZED = 0x191
_FINALIZE, _INITIALIZE = 2, 1
"""Where they stand in CK_FUNCTION_LIST, behind the version."""

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
    """One for all tokens that are reached through it. Get it by :meth:`load`.

    All calls into a module are made one after the other: PyKCS11 holds Python's lock through each of them
    anyway, and a module is initialised for the whole process or not at all.

    :ivar generation: rises whenever the module is initialised: sessions and handles from before are void.
    :ivar logins: by slot, whose PIN this process is logged in with; by fingerprint.
    """

    _loaded: ClassVar[dict[Path, Module]] = {}
    _loading: ClassVar[threading.RLock] = threading.RLock()

    def __init__(self, path: Path, reserved: str | None) -> None:
        self.path = path
        self.generation = 0
        self.logins: dict[int, bytes] = {}
        self._reserved = reserved
        self._lock = threading.RLock()
        self._process = 0
        self._library: Any = None
        self._functions: Any = None

    def __repr__(self) -> str:
        return f"Module({str(self.path)!r})"

    @classmethod
    def load(cls, path: Path, *, reserved: str | None = None) -> Module:
        """The module at *path*; it is initialised when it is first called.

        :param reserved: what the module wants to be told in ``pReserved``; NSS names its database so.
        :raise ConfigError: When PyKCS11 is not installed, or *path* is in use with another *reserved*.
        """
        require()
        if not path.is_absolute():
            raise ConfigError(f"the path of a PKCS#11 module has to be absolute, not {str(path)!r}")
        path = Path(os.path.realpath(path))
        with cls._loading:
            module = cls._loaded.setdefault(path, cls(path, reserved))
        if module._reserved != reserved:
            raise ConfigError(f"{path} is in use by this process already, initialised otherwise")
        return module

    @contextlib.contextmanager
    def calls(self) -> Iterator[Any]:
        """PyKCS11's library, for calls that nobody disturbs.

        :raise KeyProviderUnavailableError: When the module cannot be loaded or initialised.
        """
        with self._lock:
            if self._process != os.getpid():
                self._initialise()
            yield self._library

    def restart(self) -> None:
        """Initialise it anew: some see only then that a token has come, or has come back.

        :raise KeyProviderUnavailableError: When it cannot be initialised; the next call tries again.
        """
        with self._lock:
            self._process = 0
            self._initialise()

    def _initialise(self) -> None:
        self.generation += 1
        self.logins.clear()
        if self._functions is None:
            self._functions = self._function_list()
        result = self._call_initialise()
        if result == _CKR_CRYPTOKI_ALREADY_INITIALIZED and self._library is not None:
            # Ours, from before: of the process that forked this one, or to be restarted.
            ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(self._functions[_FINALIZE])(None)
            result = self._call_initialise()
        if result not in (_CKR_OK, _CKR_CRYPTOKI_ALREADY_INITIALIZED):
            raise KeyProviderUnavailableError(
                f"PKCS#11 module {self.path} cannot be initialised (0x{result:08X})"
            )
        if self._library is None:
            self._library = _library(self.path)
        self._process = os.getpid()

    def _call_initialise(self) -> int:
        reserved = self._reserved.encode() if self._reserved is not None else None
        arguments = _InitializeArguments(flags=_CKF_OS_LOCKING_OK, reserved=reserved)
        function = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)(self._functions[_INITIALIZE])
        return int(function(ctypes.byref(arguments)))

    def _function_list(self) -> Any:
        """PyKCS11 neither passes ``pReserved`` nor initialises without loading."""
        try:
            library = ctypes.CDLL(str(self.path))
            functions = ctypes.POINTER(ctypes.c_void_p)()
            result = library.C_GetFunctionList(ctypes.byref(functions))
        except (OSError, AttributeError) as exc:
            raise KeyProviderUnavailableError(f"cannot load PKCS#11 module {self.path}: {exc}") from exc
        if result != _CKR_OK:
            raise KeyProviderUnavailableError(
                f"PKCS#11 module {self.path} shows no functions (0x{result:08X})"
            )
        return functions


def find_module(name: str) -> Path:
    """The module that RFC 7512's ``module-name`` means.

    :raise ConfigError: When none of that name is installed.
    """
    if "/" not in name:
        for folder in _FOLDERS:
            for file in (f"{name}.so", f"lib{name}.so"):
                for found in sorted(Path("/").glob(f"{folder[1:]}/{file}")):
                    return found
    raise ConfigError(f"no PKCS#11 module {name!r} is installed", hint="give its path as 'module'")


def _library(path: Path) -> Any:
    from PyKCS11 import PyKCS11Error, PyKCS11Lib

    try:
        return PyKCS11Lib().load(str(path))
    except PyKCS11Error as exc:
        raise KeyProviderUnavailableError(f"cannot load PKCS#11 module {path}: {exc}") from exc


def _before_fork() -> None:
    """Let nobody be in a module, or hold its lock, when the process is copied."""
    Module._loading.acquire()
    for module in Module._loaded.values():
        module._lock.acquire()


def _after_fork() -> None:
    for module in Module._loaded.values():
        module._lock.release()
    Module._loading.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)

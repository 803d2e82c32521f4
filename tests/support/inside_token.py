"""Calls in the process of a token's module that bypass the interface of :class:`Token`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import pytest
from PyKCS11 import (
    CKA_PRIVATE_EXPONENT,
    CKA_VALUE,
    CKF_RW_SESSION,
    CKM_AES_KEY_GEN,
    CKM_RSA_PKCS_KEY_PAIR_GEN,
    Mechanism,
)

from support.folders import TESTS
from virt_sse.lab.tokens import LabToken
from virt_sse.pkcs11 import objects
from virt_sse.pkcs11.operations import TokenOperations
from virt_sse.pkcs11.token import KeyKind, Token, TokenKey

P = ParamSpec("P")
T = TypeVar("T")


def allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that start from now on import this module."""
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def inside(
    token: Token, work: Callable[Concatenate[TokenOperations, P], T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run *work* in the process of the token's module: its result."""
    return token._process.call(token._seconds, work, *args, **kwargs)


def home_of(token: LabToken) -> Path:
    """SoftHSM's folder for a token."""
    (home,) = [
        path
        for path in Path(str(token.options["softhsm-config"])).with_name("tokens").iterdir()
        if path.name.replace("-", "").endswith(token.uri.serial or "")
    ]
    return home


def hang(_operations: TokenOperations) -> None:
    """Hang with Python's lock held, like a module that waits for its network."""
    import ctypes

    ctypes.PyDLL(None).pause()


def hang_at_login(operations: TokenOperations) -> None:
    """Hang at every login from now on."""
    import PyKCS11

    PyKCS11.Session.login = lambda *_: hang(operations)
    close_sessions(operations)


def crash(_operations: TokenOperations) -> None:
    import ctypes

    ctypes.string_at(0)


def close_sessions(operations: TokenOperations) -> None:
    _library(operations).closeAllSessions(_slot(operations))


def log_out(operations: TokenOperations) -> None:
    _library(operations).openSession(_slot(operations)).logout()


def restart(operations: TokenOperations) -> None:
    operations._connection._module.restart()


def restart_before_each_use(operations: TokenOperations, key: TokenKey, payload: bytes) -> bool:
    for _ in range(10):
        restart(operations)
        if operations.aes_unwrap(key, operations.aes_wrap(key, payload)) != payload:
            return False
    return True


def finalise(operations: TokenOperations) -> None:
    _library(operations).lib.C_Finalize()


def look_at_secret(operations: TokenOperations, key: TokenKey) -> list[object]:
    secret = CKA_PRIVATE_EXPONENT if key.kind is KeyKind.RSA else CKA_VALUE

    def show(session: Any) -> list[object]:
        ((handle, _),) = objects.locate(session, key.kind, key.label, key.id)
        return list(session.getAttributeValue_fragmented(handle, [secret]))

    return operations._run("show a secret", show)


def make_another(operations: TokenOperations, key: TokenKey) -> None:
    """An AES key of the same name."""
    session = _library(operations).openSession(_slot(operations), CKF_RW_SESSION)
    session.generateKey(objects.secret_template(key.label, key.id), Mechanism(CKM_AES_KEY_GEN, None))
    session.closeSession()


def make_weak(operations: TokenOperations, label: str) -> None:
    """An RSA key of 1024 bits."""
    session = _library(operations).openSession(_slot(operations), CKF_RW_SESSION)
    session.generateKeyPair(
        objects.new_public_template(label, b"\1", 1024),
        objects.private_template(label, b"\1"),
        Mechanism(CKM_RSA_PKCS_KEY_PAIR_GEN, None),
    )
    session.closeSession()


def enable_again_and_again(operations: TokenOperations, key: TokenKey, until: Path) -> None:
    while not until.exists():
        operations.set_enabled(key, True)
        time.sleep(0.02)


def _library(operations: TokenOperations) -> Any:
    return operations._connection._module.library


def _slot(operations: TokenOperations) -> int:
    operations.check()
    return operations._connection._slot


def can_read(_operations: TokenOperations, path: str) -> bool:
    try:
        Path(path).read_bytes()
    except PermissionError:
        return False
    return True

"""A session with a token, reopened after a loss."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from PyKCS11 import (
    CKF_LOGIN_REQUIRED,
    CKF_RW_SESSION,
    CKF_TOKEN_INITIALIZED,
    CKF_USER_PIN_FINAL_TRY,
    CKF_USER_PIN_LOCKED,
    CKR_PIN_LOCKED,
    CKR_TOKEN_WRITE_PROTECTED,
    CKS_RO_USER_FUNCTIONS,
    CKS_RW_USER_FUNCTIONS,
    PyKCS11Error,
)

from virt_sse.errors import ConfigError, KeyProviderUnavailableError
from virt_sse.pkcs11.codes import LOST, WRONG_PIN
from virt_sse.pkcs11.module import Module
from virt_sse.pkcs11.pins import MOST_WRONG, Logins
from virt_sse.pkcs11.uri import TokenUri

T = TypeVar("T")

PAUSES = (0.0, 0.05)
"""Seconds to wait before each repeated search for a token or key.

SoftHSM misses a token or key while another process writes its file, and continues to miss it afterwards.
"""

_TRIES = 3
"""With the current session, with a new session, and after re-initialising the module."""


class Connection:
    """Finds the token and logs in; repeats both when a restart of the token has ended the session.

    :param uri: must match exactly one token. The serial of the first match is kept: a later match with
        another serial is an error.
    """

    def __init__(self, uri: TokenUri, module: Module, logins: Logins) -> None:
        self._uri = uri
        self._module = module
        self._logins = logins
        self._serial: str | None = None
        self._slot = 0
        self._session: Any = None
        self._generation = 0

    @property
    def generation(self) -> int:
        """Number of the module's initialisation; handles of another generation are invalid."""
        return self._generation

    def run(self, what: str, work: Callable[[Any], T], *, is_repeatable: bool = True) -> T:
        """Call *work* with a logged-in PyKCS11 session, and return its result.

        :param what: the operation's name for "the token cannot …".
        :param is_repeatable: whether *work* may be repeated after a loss of the session; if not, the session
            is checked first.
        :raise KeyProviderUnavailableError: When no session can be opened, or each session is lost.
        :raise PyKCS11Error: When *work* fails for another reason than a lost session.
        """
        if not is_repeatable:
            self.check()
        for left in reversed(range(_TRIES if is_repeatable else 1)):
            try:
                return work(self._open())
            except PyKCS11Error as exc:
                if exc.value not in LOST:
                    raise
                self._session = None
                if not left:
                    raise KeyProviderUnavailableError(f"the token cannot {what}: {exc}") from exc
                if left == 1:
                    self._module.restart()
        raise AssertionError("unreachable")

    def check(self) -> str | None:
        """Check that the token is present and answers; without this check a key not found proves nothing.

        :return: the token's serial number.
        :raise KeyProviderUnavailableError: When the token is absent or does not answer.
        """
        self._open()
        try:
            if _facts(self._module.library.getTokenInfo(self._slot))["serial"] == self._serial:
                self._session.getSessionInfo()
                return self._serial
        except PyKCS11Error:
            pass  # the token may have been removed and reinserted
        self._session = None
        self.restart()
        return self._serial

    def restart(self) -> None:
        """Re-initialise the module and reopen the token.

        :raise KeyProviderUnavailableError: When the token is absent.
        """
        self._module.restart()
        self._open()

    def _open(self) -> Any:
        if self._session is None or self._generation != self._module.generation:
            self._session = None
            self._slot = self._find_slot()
            try:
                self._session = self._new_session()
            except PyKCS11Error:
                self._module.restart()
                self._slot = self._find_slot()
                try:
                    self._session = self._new_session()
                except PyKCS11Error as exc:
                    raise KeyProviderUnavailableError(f"the token cannot be opened: {exc}") from exc
            self._generation = self._module.generation
        return self._session

    def _new_session(self) -> Any:
        library = self._module.library
        try:
            session = library.openSession(self._slot, CKF_RW_SESSION)
        except PyKCS11Error as exc:
            if exc.value != CKR_TOKEN_WRITE_PROTECTED:
                raise
            session = library.openSession(self._slot)
        try:
            self._log_in(session)
        except BaseException:
            with contextlib.suppress(PyKCS11Error):
                session.closeSession()
            raise
        return session

    def _find_slot(self) -> int:
        slots = self._slots()
        for pause in PAUSES:
            if slots:
                break
            time.sleep(pause)
            self._module.restart()
            slots = self._slots()
        if len(slots) > 1:
            raise KeyProviderUnavailableError(
                f"{len(slots)} tokens match {self._uri}", hint="name the token's serial in the URI, too"
            )
        if not slots:
            raise KeyProviderUnavailableError(
                f"no token matches {self._uri}",
                hint="for a SoftHSM token, 'virt-sse host hsm init' finds the cause",
            )
        ((slot, serial),) = slots
        if self._serial not in (None, serial):
            raise KeyProviderUnavailableError(
                f"{self._uri} now matches a different token (serial {serial}, before {self._serial})"
            )
        self._serial = serial
        return slot

    def _slots(self) -> list[tuple[int, str]]:
        found = []
        library = self._module.library
        try:
            slots = library.getSlotList(True)
        except PyKCS11Error:
            return []
        for slot in slots:
            try:
                info = library.getTokenInfo(slot)
                facts = _facts(info) | _slot_facts(library, slot)
            except PyKCS11Error:
                continue  # skip broken tokens
            if info.flags & CKF_TOKEN_INITIALIZED and self._uri.matches(facts):
                found.append((slot, str(facts["serial"])))
        return found

    def _log_in(self, session: Any) -> None:
        info = self._module.library.getTokenInfo(self._slot)
        if not info.flags & CKF_LOGIN_REQUIRED:
            raise ConfigError(f"the token {self._uri} does not require a PIN")
        if session.getSessionInfo().state in (CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS):
            return  # logged in by an earlier session
        if info.flags & CKF_USER_PIN_LOCKED:
            raise _locked()
        with self._logins.attempt(is_last=bool(info.flags & CKF_USER_PIN_FINAL_TRY)) as (pin, attempt):
            try:
                session.login(pin.text)
            except PyKCS11Error as exc:
                if exc.value == CKR_PIN_LOCKED:
                    attempt.inconclusive()
                    raise _locked() from exc
                if exc.value in WRONG_PIN:
                    raise KeyProviderUnavailableError(
                        "the token rejected the PIN as wrong",
                        hint=f"after {MOST_WRONG} wrong PINs in a row, virt-sse stops trying to log in",
                    ) from exc
                attempt.inconclusive()
                raise
            attempt.succeeded()


def _locked() -> KeyProviderUnavailableError:
    return KeyProviderUnavailableError(
        "the token has locked its PIN", hint="its security officer can set a new one"
    )


def _facts(info: Any) -> dict[str, str | int]:
    """Properties of a token, by URI attribute. Modules pad fields with blanks or NUL."""
    return {
        "token": _unpadded(info.label),
        "manufacturer": _unpadded(info.manufacturerID),
        "serial": _unpadded(info.serialNumber),
        "model": _unpadded(info.model),
    }


def _slot_facts(library: Any, slot: int) -> dict[str, str | int]:
    info, module = library.getSlotInfo(slot), library.getInfo()
    return {
        "slot_id": slot,
        "slot_description": _unpadded(info.slotDescription),
        "slot_manufacturer": _unpadded(info.manufacturerID),
        "library_description": _unpadded(module.libraryDescription),
        "library_manufacturer": _unpadded(module.manufacturerID),
        "library_version": ".".join(map(str, module.libraryVersion)),
    }


def _unpadded(text: str) -> str:
    return text.rstrip("\0 ")

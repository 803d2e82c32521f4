"""A session with a token, opened anew when it is lost."""

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
"""Before looking again for what was not found, in seconds: SoftHSM does not see a token or a key whose file
another process writes in that instant, and having missed it not later either.
"""

_TRIES = 3
"""With the session at hand, with a new one, and with the module initialised anew."""


class Connection:
    """Finds the token, logs in, and does both again when a restart of the token has ended the session.

    :param uri: which token; it has to be one, and stays the one that was found first.
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
        """Handles that were had in another one are void."""
        return self._generation

    def run(self, what: str, work: Callable[[Any], T], *, is_repeatable: bool = True) -> T:
        """What *work* makes of a PyKCS11 session that is logged in.

        :param what: what is done, as in "the token cannot …".
        :param is_repeatable: whether *work* can be done again when the session was lost meanwhile; else the
            session is looked at before.
        :raise KeyProviderUnavailableError: When there is no such session to be had, or it does not last.
        :raise PyKCS11Error: From *work*, when it does not mean that the session is lost.
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
        """Make sure that the token is there and answers: else what is not found in it means nothing.

        :return: its serial number.
        :raise KeyProviderUnavailableError: When it is not.
        """
        self._open()
        try:
            if _facts(self._module.library.getTokenInfo(self._slot))["serial"] == self._serial:
                self._session.getSessionInfo()
                return self._serial
        except PyKCS11Error:
            pass  # perhaps it was away, and is back
        self._session = None
        self.restart()
        return self._serial

    def restart(self) -> None:
        """Initialise the module anew, and open the token again.

        :raise KeyProviderUnavailableError: When it is not there.
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
                hint="if it is SoftHSM's, 'virt-sse host hsm init' finds out what is wrong with it",
            )
        ((slot, serial),) = slots
        if self._serial not in (None, serial):
            raise KeyProviderUnavailableError(
                f"another token answers to {self._uri} than before (serial {serial}, not {self._serial})"
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
                continue  # one that is broken is none
            if info.flags & CKF_TOKEN_INITIALIZED and self._uri.matches(facts):
                found.append((slot, str(facts["serial"])))
        return found

    def _log_in(self, session: Any) -> None:
        info = self._module.library.getTokenInfo(self._slot)
        if not info.flags & CKF_LOGIN_REQUIRED:
            raise ConfigError(f"the token that {self._uri} means asks for no PIN")
        if session.getSessionInfo().state in (CKS_RO_USER_FUNCTIONS, CKS_RW_USER_FUNCTIONS):
            return  # by a session that was before this one
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
                        "the token says that the PIN is wrong",
                        hint=f"after {MOST_WRONG} wrong ones in a row it is not asked any more",
                    ) from exc
                attempt.inconclusive()
                raise
            attempt.succeeded()


def _locked() -> KeyProviderUnavailableError:
    return KeyProviderUnavailableError(
        "the token has locked its PIN", hint="its security officer can set a new one"
    )


def _facts(info: Any) -> dict[str, str | int]:
    """By the URI's attributes. Fields are padded with blanks, by some modules with NUL."""
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

"""What is lost in the midst of the work: sessions, logins, handles, the module's state, the token itself."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from virt_sse.errors import ConfigError, KeyNotFoundError, KeyProviderUnavailableError
from virt_sse.files import write_private
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.pkcs11.module import Module, find_module
from virt_sse.pkcs11.options import TokenOptions
from virt_sse.pkcs11.pins import Pin, PinGuard, PinSource
from virt_sse.pkcs11.softhsm import init_token, use_config
from virt_sse.pkcs11.token import Token, TokenKey
from virt_sse.pkcs11.uri import TokenUri

MESSAGE = b"m" * 64


@pytest.fixture
def module() -> Module:
    return Module.load(find_module("softhsm2"))


@pytest.fixture
def token(lab_token: LabToken) -> Iterator[Token]:
    opened = lab_token.open()
    yield opened
    opened.close()


@pytest.fixture
def key(token: Token) -> TokenKey:
    return token.generate_aes("key", b"\1")


def works(token: Token, key: TokenKey) -> bool:
    return token.aes_unwrap(key, token.aes_wrap(key, MESSAGE)) == MESSAGE


def home_of(hsm: LabHsm, token: LabToken) -> Path:
    """SoftHSM's folder for that token."""
    serial = token.uri.serial or ""
    (home,) = [path for path in hsm.folder.tokens.iterdir() if path.name.replace("-", "").endswith(serial)]
    return home


def slot_of(module: Module, token: LabToken) -> int:
    with module.calls() as library:
        slots = [
            each
            for each in library.getSlotList(True)
            if library.getTokenInfo(each).serialNumber.strip() == token.uri.serial
        ]
    return int(slots[0])


def in_another_process(work: object) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if work() else 2  # type: ignore[operator]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_sessions_are_closed(token: Token, key: TokenKey, module: Module, lab_token: LabToken) -> None:
    with module.calls() as library:
        library.closeAllSessions(slot_of(module, lab_token))
    assert works(token, key)


def test_somebody_logs_out(token: Token, key: TokenKey, module: Module, lab_token: LabToken) -> None:
    with module.calls() as library:
        library.openSession(slot_of(module, lab_token)).logout()
    assert works(token, key)
    assert token.find(label="key") == [key]


def test_the_module_is_initialised_anew(token: Token, key: TokenKey, module: Module) -> None:
    module.restart()
    assert works(token, key)


def test_the_module_is_finalised_by_somebody_else(token: Token, key: TokenKey, module: Module) -> None:
    with module.calls() as library:
        library.lib.C_Finalize()
    assert works(token, key)


def test_closed_it_opens_again(token: Token, key: TokenKey) -> None:
    token.close()
    assert works(token, key)


def test_a_fork(token: Token, key: TokenKey) -> None:
    """Child and grandchild work on, and the parent too."""

    def child() -> bool:
        return works(token, key) and in_another_process(lambda: works(token, key)) == 0 and works(token, key)

    assert in_another_process(child) == 0
    assert works(token, key)


def test_forks_while_threads_are_at_work(token: Token, key: TokenKey) -> None:
    stop = threading.Event()

    def work() -> bool:
        while not stop.is_set():
            if not works(token, key):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(work) for _ in range(4)]
        codes = [in_another_process(lambda: works(token, key)) for _ in range(10)]
        stop.set()
        assert all(each.result() for each in busy)
    assert codes == [0] * 10


def test_threads_make_use_and_destroy_keys(token: Token) -> None:
    def live(number: int) -> bool:
        mine = token.generate_aes(f"key-{number}", b"\1")
        good = all(works(token, mine) for _ in range(10))
        token.destroy(mine)
        return good

    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(live, range(20)))
    assert token.find() == []


def test_a_token_goes_away_and_comes_back(
    token: Token, key: TokenKey, lab_hsm: LabHsm, lab_token: LabToken
) -> None:
    home = home_of(lab_hsm, lab_token)
    assert works(token, key)
    for _ in range(2):
        home.rename(lab_hsm.folder.path / "away")
        for use in (
            lambda: works(token, key),
            lambda: token.find(label="key"),
            lambda: token.is_enabled(key),
        ):
            with pytest.raises(KeyProviderUnavailableError, match="no token matches"):
                use()
        (lab_hsm.folder.path / "away").rename(home)
        assert works(token, key)


def test_the_whole_hsm_goes_away_and_comes_back(token: Token, key: TokenKey, lab_hsm: LabHsm) -> None:
    assert works(token, key)
    away = lab_hsm.folder.path / "away"
    lab_hsm.folder.tokens.rename(away)
    try:
        for _ in range(2):
            with pytest.raises(KeyProviderUnavailableError):
                works(token, key)
    finally:
        away.rename(lab_hsm.folder.tokens)
    assert works(token, key)


def test_another_token_in_its_place_is_not_it(lab_hsm: LabHsm, lab_token: LabToken) -> None:
    """Its keys would be gone, and that is no verdict."""
    by_label = TokenUri(token=lab_token.uri.token)
    guard, pin = PinGuard(lab_token.folder.wrong_pins), PinSource.file(lab_token.folder.pin)
    token = Token.open(by_label, lab_hsm.module, pin, guard=guard)
    key = token.generate_aes("key", b"\1")
    home = home_of(lab_hsm, lab_token)
    home.rename(lab_hsm.folder.path / "away")
    init_token(Module.load(lab_hsm.module), by_label.token or "", so_pin=Pin("12345678"), pin=pin.read())
    with pytest.raises(KeyProviderUnavailableError, match="another token answers"):
        works(token, key)
    token.close()


def test_many_processes_log_in_at_once(token: Token, key: TokenKey, module: Module) -> None:
    """SoftHSM writes the token's file anew at each login, and does not find it in that instant."""

    def live() -> bool:
        for _ in range(10):
            module.restart()
            if not works(token, key):
                return False
        return True

    children = []
    for _ in range(6):
        child = os.fork()
        if not child:
            status = 1
            try:
                status = 0 if live() else 2
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6


def test_a_key_that_is_changed_elsewhere_is_not_taken_for_gone(token: Token, key: TokenKey) -> None:
    """SoftHSM writes a key's file anew, too."""
    stop, pulse = os.pipe()

    def toggle() -> bool:
        os.close(pulse)
        os.set_blocking(stop, False)
        while True:
            try:
                return os.read(stop, 1) == b""
            except BlockingIOError:
                token.set_enabled(key, True)
                threading.Event().wait(0.02)

    child = os.fork()
    if not child:
        status = 1
        try:
            status = 0 if toggle() else 2
        finally:
            os._exit(status)
    os.close(stop)
    for _ in range(300):
        assert token.is_enabled(key)
    os.close(pulse)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- PINs


def test_wrong_pins_lock_us_out(token: Token, key: TokenKey, lab_token: LabToken, tmp_path: Path) -> None:
    wrong = tmp_path / "pin"
    write_private(wrong, b"0000\n")
    options = TokenOptions.parse("it", lab_token.folder.path, {**lab_token.options, "pin-file": str(wrong)})
    for _ in range(3):
        with pytest.raises(KeyProviderUnavailableError, match="says that the PIN is wrong"):
            options.open()
    with pytest.raises(KeyProviderUnavailableError, match="locked after 3 wrong PINs"):
        options.open()
    with pytest.raises(KeyProviderUnavailableError, match="locked"):
        lab_token.open()  # with the right one
    assert in_another_process(lambda: PinGuard(lab_token.folder.wrong_pins).failures() == 3) == 0

    PinGuard(lab_token.folder.wrong_pins).reset()
    assert works(token, key), "it goes on with its own PIN"
    lab_token.open().close()


def test_a_wrong_pin_does_not_profit_by_a_right_one(
    token: Token, key: TokenKey, lab_token: LabToken, tmp_path: Path
) -> None:
    """A module's login is the whole process's."""
    assert works(token, key)
    write_private(tmp_path / "pin", b"0000\n")
    with pytest.raises(KeyProviderUnavailableError, match="PIN is wrong"):
        Token.open(
            lab_token.uri,
            find_module("softhsm2"),
            PinSource.file(tmp_path / "pin"),
            guard=PinGuard(tmp_path / "wrong-pins"),
        )
    assert works(token, key)


def test_no_pin_is_shown(lab_token: LabToken, tmp_path: Path) -> None:
    pin = secrets.token_hex(8)
    write_private(tmp_path / "pin", pin.encode())
    with pytest.raises(KeyProviderUnavailableError) as caught:
        Token.open(
            lab_token.uri,
            find_module("softhsm2"),
            PinSource.file(tmp_path / "pin"),
            guard=PinGuard(tmp_path / "wrong-pins"),
        )
    error: BaseException | None = caught.value
    while error is not None:
        assert pin not in repr((error, error.args, vars(error)))
        error = error.__cause__ or error.__context__


# --- Which token, which module


def test_no_token_and_several(lab_hsm: LabHsm, lab_token: LabToken) -> None:
    guard, pin = PinGuard(lab_token.folder.wrong_pins), PinSource.file(lab_token.folder.pin)
    with pytest.raises(KeyProviderUnavailableError, match="no token matches pkcs11:token=none"):
        Token.open(TokenUri.parse("pkcs11:token=none"), lab_hsm.module, pin, guard=guard)
    with lab_hsm.token(), pytest.raises(KeyProviderUnavailableError, match="tokens match"):
        Token.open(TokenUri.parse("pkcs11:model=SoftHSM%20v2"), lab_hsm.module, pin, guard=guard)
    assert guard.failures() == 0


@pytest.mark.parametrize("path", ["/no/such/module.so", "/etc/passwd", "/lib/x86_64-linux-gnu/libc.so.6"])
def test_what_is_no_module(path: str, lab_token: LabToken) -> None:
    guard, pin = PinGuard(lab_token.folder.wrong_pins), PinSource.file(lab_token.folder.pin)
    for _ in range(2):
        with pytest.raises(KeyProviderUnavailableError, match="cannot load PKCS#11 module"):
            Token.open(lab_token.uri, Path(path), pin, guard=guard)


def test_a_module_has_one_configuration_in_a_process(lab_token: LabToken, lab_nss_token: LabToken) -> None:
    with pytest.raises(ConfigError, match=r"uses SoftHSM with .* already"):
        use_config(Path("/other/softhsm2.conf"))
    with pytest.raises(ConfigError, match="initialised otherwise"):
        Module.load(find_module("softokn3"), reserved="configdir='sql:/elsewhere'")
    with pytest.raises(ConfigError, match="absolute"):
        Module.load(Path("libsofthsm2.so"))
    with pytest.raises(ConfigError, match="no PKCS#11 module 'none' is installed"):
        find_module("none")
    lab_token.open().close()
    lab_nss_token.open().close()


def test_a_key_that_is_gone_is_gone(token: Token, key: TokenKey) -> None:
    token.destroy(key)
    with pytest.raises(KeyNotFoundError):
        works(token, key)

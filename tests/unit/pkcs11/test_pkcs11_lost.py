"""What is lost in the midst of the work: sessions, logins, handles, the module's state, the token itself."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from support import inside_token
from support.forking import Report, fork, run_forked
from support.inside_token import home_of, inside
from support.waiting import is_gone, wait_until
from virt_sse.errors import ConfigError, KeyNotFoundError, KeyProviderUnavailableError
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.pkcs11.module import find_module
from virt_sse.pkcs11.operations import TokenOperations
from virt_sse.pkcs11.options import TokenOptions
from virt_sse.pkcs11.pins import Pin, PinGuard, PinSource
from virt_sse.pkcs11.softhsm import TokenFolder, init_token
from virt_sse.pkcs11.token import Token, TokenKey
from virt_sse.pkcs11.uri import TokenUri
from virt_sse.system.files import write_private

MESSAGE = b"m" * 64


@pytest.fixture
def token(lab_token: LabToken, monkeypatch: pytest.MonkeyPatch) -> Iterator[Token]:
    inside_token.allow(monkeypatch)
    opened = lab_token.open()
    yield opened
    opened.close()


@pytest.fixture
def key(token: Token) -> TokenKey:
    return token.generate_aes("key", b"\1")


def works(token: Token, key: TokenKey) -> bool:
    return token.aes_unwrap(key, token.aes_wrap(key, MESSAGE)) == MESSAGE


def guard_is_held(token: LabToken) -> bool:
    """Whether somebody is just logging in."""
    with token.folder.wrong_pins.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize(
    "what", [inside_token.close_sessions, inside_token.log_out, inside_token.restart, inside_token.finalise]
)
def test_sessions_lost_in_the_module_are_reopened(
    token: Token, key: TokenKey, what: Callable[[TokenOperations], None]
) -> None:
    inside(token, what)
    assert works(token, key)
    inside(token, what)
    assert token.find(label="key") == [key]


def test_a_killed_module_process_is_replaced(token: Token, key: TokenKey) -> None:
    before = token.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: is_gone(before), "the module's process has ended")
    assert works(token, key)
    assert token.pid != before


def test_a_crashed_module_is_reported_and_started_again(token: Token, key: TokenKey) -> None:
    with pytest.raises(KeyProviderUnavailableError, match=r"crashed its process \(SIGSEGV\)"):
        inside(token, inside_token.crash)
    assert works(token, key)


@pytest.mark.slow
def test_a_hanging_module_delays_only_its_callers_and_only_once(lab_token: LabToken, key: TokenKey) -> None:
    """Those wait who ask it, and no longer than that; nobody else does."""
    options = lab_token.options
    with (
        closing(
            Token.open(
                lab_token.uri,
                Path(str(options["module"])),
                PinSource.file(lab_token.folder.pin),
                guard=PinGuard(lab_token.folder.wrong_pins),
                environment={"SOFTHSM2_CONF": str(options["softhsm-config"])},
                seconds=2,
            )
        ) as slow,
        ThreadPoolExecutor(4) as pool,
    ):
        began = time.monotonic()
        hanging = pool.submit(inside, slow, inside_token.hang)
        time.sleep(0.2)
        assert time.monotonic() - began < 1.5, "this thread waits, too"
        others = [pool.submit(works, slow, key) for _ in range(3)]
        for each in (hanging, *others):
            with pytest.raises(KeyProviderUnavailableError, match="did not answer within 2 s"):
                each.result()
        assert time.monotonic() - began < 5, "they were tried one after the other"
        assert works(slow, key)


@pytest.mark.parametrize(("ended_by", "wrong"), [(signal.SIGALRM, 0), (signal.SIGKILL, 1)])
def test_a_login_that_hangs_is_no_wrong_pin(
    token: Token, key: TokenKey, lab_token: LabToken, ended_by: signal.Signals, wrong: int
) -> None:
    """One that is killed may have been, for all that is known."""
    guard = PinGuard(lab_token.folder.wrong_pins)
    inside(token, inside_token.hang_at_login)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(works, token, key)
        wait_until(lambda: guard_is_held(lab_token), "the login is under way")
        assert token.pid is not None
        os.kill(token.pid, ended_by)
        with pytest.raises(KeyProviderUnavailableError):
            hanging.result()
    assert guard.failures() == wrong
    assert works(token, key)
    assert guard.failures() == 0


@pytest.mark.slow
def test_a_hanging_module_process_ends_with_its_user(
    lab_token: LabToken, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside_token.allow(monkeypatch)

    def use(report: Report) -> None:
        token = lab_token.open()
        token._seconds = 1
        report(token.pid)
        inside(token, inside_token.hang)

    user = fork(use)
    worker = int(user.line())
    time.sleep(0.2)
    user.kill()
    wait_until(lambda: is_gone(worker), "the module's process has ended")


def test_the_process_of_a_module_leaves_no_core(token: Token) -> None:
    limits = Path(f"/proc/{token.pid}/limits").read_text("ascii")
    assert re.search(r"Max core file size +0 +0 ", limits)


@pytest.mark.usefixtures("as_root")  # others may not read the memory map of that process
def test_a_module_lies_in_the_memory_of_its_own_process_alone(token: Token) -> None:
    assert "libsofthsm2" in Path(f"/proc/{token.pid}/maps").read_text("utf-8")
    assert "libsofthsm2" not in Path("/proc/self/maps").read_text("utf-8")


def test_a_closed_token_opens_again(token: Token, key: TokenKey) -> None:
    token.close()
    assert works(token, key)


def test_child_and_grandchild_and_parent_use_the_token(token: Token, key: TokenKey) -> None:
    """Child and grandchild work on, and the parent too."""

    def child() -> None:
        assert works(token, key)
        assert run_forked(work) == 0
        assert works(token, key)

    def work() -> None:
        assert works(token, key)

    assert run_forked(child) == 0
    assert works(token, key)


@pytest.mark.slow
def test_forks_use_the_token_while_threads_do(token: Token, key: TokenKey) -> None:
    stop = threading.Event()

    def work() -> bool:
        while not stop.is_set():
            if not works(token, key):
                return False
        return True

    def work_once() -> None:
        assert works(token, key)

    with ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(work) for _ in range(4)]
        codes = [run_forked(work_once) for _ in range(10)]
        stop.set()
        assert all(each.result() for each in busy)
    assert codes == [0] * 10


@pytest.mark.slow
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
    home = home_of(lab_token)
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


def test_another_token_in_the_place_of_a_token_is_refused(lab_hsm: LabHsm, lab_token: LabToken) -> None:
    """Its keys would be gone, and that is no verdict."""
    by_label = TokenUri(token=lab_token.uri.token)
    guard, pin = PinGuard(lab_token.folder.wrong_pins), PinSource.file(lab_token.folder.pin)
    environment = lab_hsm.folder.environment
    with closing(Token.open(by_label, lab_hsm.module, pin, guard=guard, environment=environment)) as token:
        key = token.generate_aes("key", b"\1")
        home = home_of(lab_token)
        home.rename(lab_hsm.folder.path / "away")
        so_pin = Pin("12345678")
        init_token(lab_hsm.module, environment, by_label.token or "", so_pin=so_pin, pin=pin.read())
        for _ in range(2):
            with pytest.raises(KeyProviderUnavailableError, match=r"a different token|no token"):
                works(token, key)
            token.close()  # it is not taken for it by a new process either


@pytest.mark.slow
def test_many_processes_log_in_at_once(token: Token, key: TokenKey, lab_token: LabToken) -> None:
    """SoftHSM writes the token's file anew at each login, and does not find it in that instant."""

    def live(_number: int) -> bool:
        with closing(lab_token.open()) as mine:
            return inside(mine, inside_token.restart_before_each_use, key, MESSAGE)

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(live, range(6)))


def test_a_key_that_is_changed_elsewhere_is_not_taken_for_gone(
    token: Token, key: TokenKey, lab_token: LabToken, tmp_path: Path
) -> None:
    """SoftHSM writes a key's file anew, too."""
    end = tmp_path / "end"
    with closing(lab_token.open()) as other, ThreadPoolExecutor(1) as pool:
        busy = pool.submit(inside, other, inside_token.enable_again_and_again, key, end)
        for _ in range(300):
            assert token.is_enabled(key)
        end.touch()
        busy.result()


# --- PINs


def test_wrong_pins_lock_us_out(token: Token, key: TokenKey, lab_token: LabToken, tmp_path: Path) -> None:
    wrong = tmp_path / "pin"
    write_private(wrong, b"0000\n")
    options = TokenOptions.parse("it", lab_token.folder.path, {**lab_token.options, "pin-file": str(wrong)})
    for _ in range(3):
        with pytest.raises(KeyProviderUnavailableError, match="rejected the PIN as wrong"):
            options.open()
    with pytest.raises(KeyProviderUnavailableError, match="locked after 3 wrong PINs"):
        options.open()
    with pytest.raises(KeyProviderUnavailableError, match="locked"):
        lab_token.open()  # with the right one
    child = fork(lambda report: report(PinGuard(lab_token.folder.wrong_pins).failures()))
    assert child.lines() == ["3"]
    assert child.wait() == 0

    PinGuard(lab_token.folder.wrong_pins).reset()
    assert works(token, key), "it goes on with its own PIN"
    lab_token.open().close()


def test_a_wrong_pin_does_not_profit_by_a_right_one(
    token: Token, key: TokenKey, lab_token: LabToken, lab_hsm: LabHsm, tmp_path: Path
) -> None:
    assert works(token, key)
    write_private(tmp_path / "pin", b"0000\n")
    with pytest.raises(KeyProviderUnavailableError, match="PIN as wrong"):
        Token.open(
            lab_token.uri,
            find_module("softhsm2"),
            PinSource.file(tmp_path / "pin"),
            guard=PinGuard(tmp_path / "wrong-pins"),
            environment=lab_hsm.folder.environment,
        )
    assert works(token, key)


def test_no_pin_is_shown(lab_token: LabToken, lab_hsm: LabHsm, tmp_path: Path) -> None:
    pin = secrets.token_hex(8)
    write_private(tmp_path / "pin", pin.encode())
    with pytest.raises(KeyProviderUnavailableError) as caught:
        Token.open(
            lab_token.uri,
            find_module("softhsm2"),
            PinSource.file(tmp_path / "pin"),
            guard=PinGuard(tmp_path / "wrong-pins"),
            environment=lab_hsm.folder.environment,
        )
    error: BaseException | None = caught.value
    while error is not None:
        assert pin not in repr((error, error.args, vars(error)))
        error = error.__cause__ or error.__context__


# --- Which token, which module


def test_a_missing_or_ambiguous_token_is_refused(lab_hsm: LabHsm, lab_token: LabToken) -> None:
    guard, pin = PinGuard(lab_token.folder.wrong_pins), PinSource.file(lab_token.folder.pin)

    def open_any(uri: str) -> None:
        environment = lab_hsm.folder.environment
        Token.open(TokenUri.parse(uri), lab_hsm.module, pin, guard=guard, environment=environment)

    with pytest.raises(KeyProviderUnavailableError, match="no token matches pkcs11:token=none"):
        open_any("pkcs11:token=none")
    with lab_hsm.token(), pytest.raises(KeyProviderUnavailableError, match="tokens match"):
        open_any("pkcs11:model=SoftHSM%20v2")
    assert guard.failures() == 0


@pytest.mark.parametrize("path", ["/no/such/module.so", "/etc/passwd", "/lib/x86_64-linux-gnu/libc.so.6"])
def test_an_invalid_module_is_refused(path: str, lab_token: LabToken) -> None:
    guard, pin = PinGuard(lab_token.folder.wrong_pins), PinSource.file(lab_token.folder.pin)
    with pytest.raises(KeyProviderUnavailableError, match="cannot load PKCS#11 module"):
        Token.open(lab_token.uri, Path(path), pin, guard=guard)
    with pytest.raises(ConfigError, match="no PKCS#11 module 'none' is installed"):
        find_module("none")


def test_each_token_has_its_own_configuration(
    token: Token, key: TokenKey, lab_nss_token: LabToken, tmp_path: Path
) -> None:
    folder = TokenFolder(tmp_path / "hsm")
    folder.initialise("another")
    with closing(folder.open()) as another, closing(lab_nss_token.open()) as nss:
        assert another.find() == []
        assert another.serial not in (token.serial, nss.serial)
        assert works(token, key)


def test_a_pin_is_prompted_for_in_this_process_when_needed(lab_token: LabToken) -> None:
    """A prompt is this process's, and whoever types is not hurried."""
    options = TokenOptions.parse("it", lab_token.folder.path, lab_token.options)
    asked = []

    def ask() -> str:
        asked.append(os.getpid())
        return lab_token.pin

    with closing(options.open(PinSource.prompt(ask))) as token:
        assert token.find() == []
        token.close()
        assert token.find() == []
    assert asked == [os.getpid()]

    def give_up() -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        options.open(PinSource.prompt(give_up))


def test_a_destroyed_key_is_not_found(token: Token, key: TokenKey) -> None:
    token.destroy(key)
    with pytest.raises(KeyNotFoundError):
        works(token, key)

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import pytest

from support.forking import Report, fork, run_forked
from virt_sse.errors import ConfigError, KeyProviderUnavailableError
from virt_sse.pkcs11.pins import Pin, PinGuard, PinSource


@pytest.fixture
def guard(tmp_path: Path) -> PinGuard:
    return PinGuard(tmp_path / "folder/wrong-pins")


def fail(guard: PinGuard) -> None:
    with guard.attempt():
        pass


def write(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_pin_does_not_print_or_pickle() -> None:
    pin = Pin("4711")
    assert "4711" not in repr(pin) + str(pin)
    with pytest.raises(TypeError):
        pickle.dumps(pin)


@pytest.mark.parametrize(
    "content", [b"4711", b"4711\n", b"4711\r\n", b"4711\nmore\n"], ids=str.split("a b c d")
)
def test_a_pin_is_read_from_its_file_at_each_use(tmp_path: Path, content: bytes) -> None:
    source = PinSource.file(write(tmp_path / "pin", content))
    assert source.read().text == "4711"
    assert "4711" not in repr(source)
    write(tmp_path / "pin", b"0815")
    assert source.read().text == "0815"


@pytest.mark.parametrize("content", [b"", b"\n4711", b"47\x0011", b"\xff", b"1" * 256])
def test_a_file_without_a_pin_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ConfigError, match="PIN") as caught:
        PinSource.file(write(tmp_path / "pin", content)).read()
    assert "4711" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match="accessible to other users"):
        PinSource.file(write(tmp_path / "pin", b"4711", mode)).read()


def test_a_missing_pin_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        PinSource.file(tmp_path / "pin").read()
    with pytest.raises(ConfigError, match="not a file"):
        PinSource.file(tmp_path).read()


def test_a_descriptor_is_read_once_to_its_end() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"47")
    os.write(writing, b"11\n")
    os.close(writing)
    source = PinSource.descriptor(reading)
    assert source.read().text == "4711"
    os.close(reading)
    assert source.read().text == "4711"
    with pytest.raises(ConfigError, match="descriptor"):
        PinSource.descriptor(reading).read()


def test_a_prompt_is_shown_once() -> None:
    asked = []

    def ask() -> str:
        asked.append(1)
        return "4711"

    source = PinSource.prompt(ask)
    assert [source.read().text for _ in range(2)] == ["4711", "4711"]
    assert asked == [1]


def test_after_three_wrong_pins_the_token_is_locked_for_us(guard: PinGuard) -> None:
    for _ in range(3):
        fail(guard)
    with pytest.raises(KeyProviderUnavailableError, match="locked after 3 wrong PINs"), guard.attempt():
        pytest.fail("the token was asked")
    guard.reset()
    with guard.attempt() as attempt:
        attempt.succeeded()
    assert guard.failures() == 0


def test_a_right_pin_resets_the_count_and_a_dead_token_leaves_the_count(guard: PinGuard) -> None:
    fail(guard)
    fail(guard)
    with guard.attempt() as attempt:
        attempt.inconclusive()
    assert guard.failures() == 2
    with guard.attempt() as attempt:
        attempt.succeeded()
    assert guard.failures() == 0


def test_wrong_pins_are_counted_over_processes_and_restarts(guard: PinGuard, tmp_path: Path) -> None:
    assert run_forked(lambda: fail(guard)) == 0
    assert PinGuard(tmp_path / "folder/wrong-pins").failures() == 1
    assert (tmp_path / "folder/wrong-pins").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700


def test_a_killed_login_counts_as_a_wrong_pin(guard: PinGuard) -> None:
    def die() -> None:
        with guard.attempt():
            os.kill(os.getpid(), signal.SIGKILL)

    for failures in (1, 2, 3):
        assert run_forked(die) == -signal.SIGKILL
        assert guard.failures() == failures
    assert run_forked(die) == 1, "it was let in"


def test_logins_are_tried_one_at_a_time(guard: PinGuard) -> None:
    """Ten guessers at once have three tries between them."""

    def guess(report: Report) -> None:
        with guard.attempt():
            report("tried")

    children = [fork(guess) for _ in range(10)]
    assert [line for child in children for line in child.lines()] == ["tried"] * 3
    assert sorted(child.wait() for child in children) == [0] * 3 + [1] * 7


def test_an_invalid_count_locks_the_token(guard: PinGuard, tmp_path: Path) -> None:
    fail(guard)
    write(tmp_path / "folder/wrong-pins", b"none\n")
    with pytest.raises(KeyProviderUnavailableError, match="locked"), guard.attempt():
        pass


def test_a_count_that_others_could_change_is_refused(guard: PinGuard, tmp_path: Path) -> None:
    fail(guard)
    (tmp_path / "folder/wrong-pins").chmod(0o666)
    with pytest.raises(ConfigError, match="accessible to other users"), guard.attempt():
        pass
    (tmp_path / "folder/wrong-pins").unlink()
    (tmp_path / "folder/wrong-pins").symlink_to(write(tmp_path / "other", b"0\n"))
    with pytest.raises(ConfigError, match="cannot count"), guard.attempt():
        pass

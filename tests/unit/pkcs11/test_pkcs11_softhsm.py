"""The token that ``virt-sse host hsm init`` makes."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from support.faults import STEP, dies_at
from virt_sse.errors import ConfigError, InvalidValueError, KeyProviderUnavailableError
from virt_sse.lab.tokens import LabHsm
from virt_sse.pkcs11 import softhsm
from virt_sse.pkcs11.pins import Pin
from virt_sse.pkcs11.softhsm import TokenFolder, init_token

MESSAGE = b"m" * 64


@pytest.fixture
def folder(lab_hsm: LabHsm, tmp_path: Path) -> TokenFolder:
    """Where no token is yet, and SoftHSM is installed."""
    return TokenFolder(tmp_path / "hsm")


def make(folder: TokenFolder) -> None:
    assert folder.initialise("it")
    with closing(folder.open()) as token:
        key = token.generate_aes("key", b"\1")
        assert token.aes_unwrap(key, token.aes_wrap(key, MESSAGE)) == MESSAGE


def use_again(folder: TokenFolder) -> None:
    assert not folder.initialise("it")
    with closing(folder.open()) as token:
        (key,) = token.find("key")
        assert token.aes_unwrap(key, token.aes_wrap(key, MESSAGE)) == MESSAGE


@pytest.mark.slow
def test_a_creation_killed_anywhere_is_continued(folder: TokenFolder) -> None:
    """Making a token is killed, and done by the next command, or was done."""
    for number in range(1, 1000, 2 * STEP):
        here = TokenFolder(folder.path / str(number))
        if not dies_at(number, (softhsm,), lambda here=here: here.initialise("it")):  # type: ignore[misc]
            assert number > 40, "too few lines were tried"
            return
        here.initialise("it")
        assert not here.initialise("it")
        names = {path.name for path in here.path.iterdir() if not path.name.startswith(".uri.")}
        assert names - {"new"} == {
            "pin",
            "so-pin",
            "softhsm2.conf",
            "token.object",
            "tokens",
            "uri",
            "wrong-pins",
        }
        with closing(here.open()) as token:
            key = token.generate_aes("key", b"\1")
            assert token.aes_unwrap(key, token.aes_wrap(key, MESSAGE)) == MESSAGE
        for path in (here.path, *here.path.rglob("*")):
            assert not path.stat().st_mode & 0o077, path
        shutil.rmtree(here.path)
    raise AssertionError("it has no end")


def test_a_torn_token_is_mended_with_its_keys(folder: TokenFolder) -> None:
    """A login that is killed as it writes leaves an empty file; mended, the token has its keys again."""
    make(folder)
    (file,) = folder.tokens.glob("*/token.object")
    file.write_bytes(b"")
    with pytest.raises(KeyProviderUnavailableError):
        folder.open()
    use_again(folder)


def test_a_lost_token_is_never_made_anew(folder: TokenFolder, tmp_path: Path) -> None:
    """What was there and is not any more is never made anew."""
    make(folder)
    folder.tokens.rename(tmp_path / "away")
    with pytest.raises(KeyProviderUnavailableError):
        folder.initialise("it")
    folder.tokens.mkdir(mode=0o700, exist_ok=True)
    with pytest.raises(KeyProviderUnavailableError):
        folder.initialise("it")
    folder.tokens.rmdir()
    (tmp_path / "away").rename(folder.tokens)
    uri = folder.uri.read_bytes()
    folder.uri.unlink()
    with pytest.raises(ConfigError):
        folder.initialise("it")
    folder.uri.write_bytes(uri)
    use_again(folder)


def test_a_folder_without_a_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token in") as caught:
        TokenFolder(tmp_path).read_uri()
    assert "host hsm init" in str(caught.value.hint)
    TokenFolder(tmp_path).uri.write_text("token=a")
    with pytest.raises(ConfigError, match="cannot read"):
        TokenFolder(tmp_path).read_uri()


@pytest.mark.parametrize("label", ["", "x" * 33, "é" * 17, "a\nb"])
def test_an_invalid_label_is_refused(label: str, lab_hsm: LabHsm) -> None:
    with pytest.raises(InvalidValueError, match="label"):
        init_token(lab_hsm.module, lab_hsm.folder.environment, label, so_pin=Pin("12345678"), pin=Pin("1234"))

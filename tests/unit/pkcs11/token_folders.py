"""What is tried with whole token folders, in a process that has no SoftHSM yet: it reads one configuration.

Each child of this process is such a one. ``python token_folders.py NAME FOLDER`` runs the function NAME.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from faults import killed_at_line

from virt_sse.errors import ConfigError, KeyProviderUnavailableError
from virt_sse.pkcs11 import softhsm
from virt_sse.pkcs11.module import Module, find_module
from virt_sse.pkcs11.softhsm import TokenFolder

MESSAGE = b"m" * 64


def killed_at_every_second_line(folder: Path) -> None:
    """Making a token is killed, and done by the next command, or was done."""
    for number in range(1, 1000, 2):
        here = TokenFolder(folder / str(number))
        if not killed_at_line(number, (softhsm,), lambda here=here: here.initialise("it")):  # type: ignore[misc]
            assert number > 40, "too few lines were tried"
            return
        in_child(lambda here=here: finish(here))  # type: ignore[misc]
        shutil.rmtree(here.path)
    raise AssertionError("it has no end")


def finish(here: TokenFolder) -> None:
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
    use(here)
    for path in (here.path, *here.path.rglob("*")):
        assert not path.stat().st_mode & 0o077, path


def torn(folder: Path) -> None:
    """A login that is killed as it writes leaves an empty file; mended, the token has its keys again."""
    here = TokenFolder(folder)
    in_child(lambda: use_new(here))
    (file,) = here.tokens.glob("*/token.object")
    file.write_bytes(b"")
    in_child(lambda: is_unreachable(here))
    in_child(lambda: use_again(here))


def lost(folder: Path) -> None:
    """What was there and is not any more is never made anew."""
    here = TokenFolder(folder)
    in_child(lambda: use_new(here))
    here.tokens.rename(folder.with_name("away"))
    in_child(lambda: is_refused(here, KeyProviderUnavailableError))
    here.tokens.mkdir(mode=0o700)
    in_child(lambda: is_refused(here, KeyProviderUnavailableError))
    here.tokens.rmdir()
    folder.with_name("away").rename(here.tokens)
    uri = here.uri.read_bytes()
    here.uri.unlink()
    in_child(lambda: is_refused(here, ConfigError))
    here.uri.write_bytes(uri)
    in_child(lambda: use_again(here))


def use_new(here: TokenFolder) -> None:
    assert here.initialise("it")
    use(here)


def use(here: TokenFolder) -> None:
    token = here.open()
    key = token.generate_aes("key", b"\1")
    assert token.aes_unwrap(key, token.aes_wrap(key, MESSAGE)) == MESSAGE
    token.close()


def use_again(here: TokenFolder) -> None:
    assert not here.initialise("it")
    token = here.open()
    (key,) = token.find("key")
    assert token.aes_unwrap(key, token.aes_wrap(key, MESSAGE)) == MESSAGE
    token.close()


def is_unreachable(here: TokenFolder) -> None:
    is_raised(KeyProviderUnavailableError, here.open)


def is_refused(here: TokenFolder, kind: type[Exception]) -> None:
    is_raised(kind, lambda: here.initialise("it"))


def is_raised(kind: type[Exception], work: Callable[[], object]) -> None:
    try:
        work()
    except kind:
        return
    raise AssertionError("nothing was said")


def in_child(work: Callable[[], object]) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            work()
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


if __name__ == "__main__":
    Module.load(find_module(softhsm.MODULE_NAME))  # what is to be imported is, and nothing is initialised
    {"killed": killed_at_every_second_line, "torn": torn, "lost": lost}[sys.argv[1]](Path(sys.argv[2]))

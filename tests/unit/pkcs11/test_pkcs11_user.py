"""A PKCS#11 module under a user of its own: the token works, and root's files stay closed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp

import pytest

from support import inside_token
from support.inside_token import inside
from virt_sse.errors import ConfigError, KeyProviderUnavailableError
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.pkcs11.module import Module, load
from virt_sse.pkcs11.options import TokenOptions
from virt_sse.pkcs11.process import ModuleProcess
from virt_sse.pkcs11.worker_user import WorkerUser
from virt_sse.system.files import write_private

NOBODY = "nobody"


def name_of(module: Module) -> str:
    raise AssertionError("no process runs this function")


@pytest.fixture
def shared_token() -> Iterator[LabToken]:
    """A token whose files belong to another user, as do those of an HSM's own daemon."""
    can_run = subprocess.run(
        ["setpriv", "--reuid", NOBODY, "--clear-groups", sys.executable, "-c", "import virt_sse"],
        capture_output=True,
        check=False,
    )
    if can_run.returncode != 0:
        pytest.skip(f"the user {NOBODY} cannot run {sys.executable}")
    base = Path(mkdtemp())
    base.chmod(0o711)
    try:
        with LabHsm(base=base) as hsm, hsm.token() as token:
            for path in (hsm.folder.path.parent, hsm.folder.path, hsm.folder.config, hsm.folder.tokens):
                shutil.chown(path, NOBODY)
            for path in hsm.folder.tokens.rglob("*"):
                shutil.chown(path, NOBODY)
            yield token
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.root
def test_the_module_runs_as_its_user(
    shared_token: LabToken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside_token.allow(monkeypatch)
    write_private(tmp_path / "secret", b"root's")
    options = {**shared_token.options, "user": NOBODY}
    with closing(TokenOptions.parse("it", shared_token.folder.path, options).open()) as token:
        key = token.generate_aes("key", b"1")
        assert token.aes_unwrap(key, token.aes_wrap(key, bytes(32))) == bytes(32)
        user = WorkerUser.named(NOBODY)
        status = Path(f"/proc/{token.pid}/status").read_text().splitlines()
        assert ["Uid:", *[str(user.uid)] * 4] in [line.split() for line in status]
        assert ["Gid:", *[str(user.gid)] * 4] in [line.split() for line in status]
        assert not inside(token, inside_token.can_read, str(tmp_path / "secret"))
    with closing(shared_token.open()) as as_root:
        assert inside(as_root, inside_token.can_read, str(tmp_path / "secret"))


@pytest.mark.root
def test_a_user_that_cannot_start_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/proc/1/root/usr/bin/python3")
    process = ModuleProcess(
        load, Path("/module"), None, environment={}, user=WorkerUser(65534, 65534, ()), seconds=1
    )
    with pytest.raises(KeyProviderUnavailableError, match="PKCS#11 module as user 65534: "):
        process.call(1, name_of)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uri": "pkcs11:token=x", "user": "no-such-user"}, "'user' in it: no user 'no-such-user'"),
        ({"uri": "pkcs11:token=x", "user": "\ud800"}, "'user' in it: no user"),
        ({"user": NOBODY}, "'user' in it needs a 'uri'"),
    ],
)
def test_users_that_cannot_be(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenOptions.parse("it", tmp_path, options)
    assert not list(tmp_path.iterdir())

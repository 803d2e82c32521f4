"""The token that ``virt-sse host hsm init`` makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from virt_sse.errors import ConfigError, InvalidValueError
from virt_sse.lab.tokens import LabHsm
from virt_sse.pkcs11.module import Module
from virt_sse.pkcs11.pins import Pin
from virt_sse.pkcs11.softhsm import TokenFolder, init_token


@pytest.mark.parametrize("what", ["killed", "torn", "lost"])
@pytest.mark.usefixtures("lab_hsm")
def test_a_folder(what: str, tmp_path: Path) -> None:
    script = Path(__file__).with_name("token_folders.py")
    done = subprocess.run(
        [sys.executable, script, what, tmp_path / "hsm"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(script.parents[1]), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_no_token_in_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no token in") as caught:
        TokenFolder(tmp_path).read_uri()
    assert "host hsm init" in str(caught.value.hint)
    TokenFolder(tmp_path).uri.write_text("token=a")
    with pytest.raises(ConfigError, match="cannot read"):
        TokenFolder(tmp_path).read_uri()


@pytest.mark.parametrize("label", ["", "x" * 33, "é" * 17, "a\nb"])
def test_labels_that_are_none(label: str, lab_hsm: LabHsm) -> None:
    with pytest.raises(InvalidValueError, match="label"):
        init_token(Module.load(lab_hsm.module), label, so_pin=Pin("12345678"), pin=Pin("1234"))

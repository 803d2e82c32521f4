"""The search for secrets finds every spelling: otherwise a search without a finding would mean nothing."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.canaries import Canaries

SECRET = os.urandom(32)
WAYS: dict[str, Callable[[bytes], bytes]] = {
    "raw": lambda secret: secret,
    "hex": lambda secret: secret.hex().encode(),
    "upper-hex": lambda secret: secret.hex().upper().encode(),
    "base64": base64.b64encode,
    "base64-1": lambda secret: base64.b64encode(b"x" + secret + b"y"),
    "base64-2": lambda secret: base64.b64encode(b"xx" + secret + b"yy"),
    "base64-url": lambda secret: base64.urlsafe_b64encode(b"x" + secret),
    "json": lambda secret: json.dumps(secret.decode("latin-1")).encode(),
    "python": lambda secret: repr(secret).encode(),
    "utf-16": lambda secret: base64.b64encode(secret).decode().encode("utf-16-le"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_planted_secret_is_found(tmp_path: Path, way: str) -> None:
    canaries = Canaries()
    canaries.add("planted", SECRET)
    canaries.add("other", os.urandom(32))
    file = tmp_path / "a/log"
    file.parent.mkdir()
    file.write_bytes(b"before " + WAYS[way](SECRET) + b" behind")
    (tmp_path / "b").write_bytes(os.urandom(1 << 16))
    assert canaries.in_files(tmp_path) == {"planted": {file}}


@pytest.mark.parametrize("place", ["cmdline", "environ"])
def test_a_secret_of_a_process_is_found(place: str) -> None:
    canaries = Canaries()
    canaries.add("planted", SECRET)
    assert canaries.in_processes() == {}
    argument = [SECRET.hex()] if place == "cmdline" else []
    environment = {"KEY": SECRET.hex()} if place == "environ" else {}
    program = [sys.executable, "-I", "-c", "print(flush=True); input()", *argument]
    with subprocess.Popen(program, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert canaries.in_processes() == {"planted": {Path(f"/proc/{process.pid}/{place}")}}
        process.communicate(b"\n")

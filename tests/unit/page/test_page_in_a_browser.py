"""The page in headless Chromium: all parts load, and the page's own policy refuses none of them.

``VIRT_SSE_SCREENSHOTS=backend/docs/page`` replaces the pictures in the documents.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn

from support.page_client import page_of
from support.page_overview import busy_host
from support.waiting import wait_until

CHROMIUM = shutil.which("chromium-headless-shell") or shutil.which("chromium")
LIGHT, DARK = "--blink-settings=preferredColorScheme=1", "--blink-settings=preferredColorScheme=0"
_ORDERS = "/disks/00000000-0000-0000-0000-000000000001"
_PNG = b"\x89PNG"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium or chromium-headless-shell"),
]


@contextmanager
def served() -> Iterator[int]:
    config = uvicorn.Config(page_of(busy_host()), port=0, log_config=None, lifespan="off", ws="none")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started, "the page is served")
        yield int(server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


def browse(folder: Path, port: int, target: str, *options: str) -> tuple[str, str]:
    """Let Chromium show a page: its document after the scripts have run, and its messages."""
    assert CHROMIUM is not None
    profile = f"--user-data-dir={folder / 'profile'}"
    base = [CHROMIUM, "--no-sandbox", "--disable-gpu", "--hide-scrollbars", profile]
    base += ["--enable-logging=stderr", "--v=0", *options, f"http://localhost:{port}{target}"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    done = subprocess.run(base, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_the_page_shows_in_light_dark_and_narrow(tmp_path: Path) -> None:
    with served() as port:
        for name, target, look, window in (
            ("overview", "/", LIGHT, "1180,1240"),
            ("disk", _ORDERS, DARK, "1180,1130"),
            ("narrow", _ORDERS, LIGHT, "944,1130"),
        ):
            picture = tmp_path / f"{name}.png"
            browse(tmp_path, port, target, look, f"--window-size={window}", f"--screenshot={picture}")
            content = picture.read_bytes()
            assert content.startswith(_PNG)
            assert 20_000 < len(content) < 400_000
        began = time.monotonic()
        body, messages = browse(tmp_path, port, _ORDERS, "--dump-dom", "--virtual-time-budget=6000")
        assert "Updates itself every 5 s." in body
        assert "encrypted twice" in body
        assert "Content Security Policy" not in messages
        assert "Uncaught" not in messages
        assert time.monotonic() - began < 60
    if folder := os.environ.get("VIRT_SSE_SCREENSHOTS"):
        for name in ("overview", "disk"):
            shutil.copy(tmp_path / f"{name}.png", Path(folder) / f"{name}.png")

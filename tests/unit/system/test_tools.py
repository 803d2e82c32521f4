from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.waiting import is_gone, wait_until
from virt_sse.errors import ImageError, ToolError
from virt_sse.system.tools import failure, passphrase_descriptor, run, run_with_progress


def test_a_tool_gets_its_input_and_returns_its_output() -> None:
    assert run(["cat"], confinement=None, stdin=b"a line\n") == "a line\n"
    assert run(["true"], confinement=None) == ""


def test_every_failure_of_a_tool_is_named() -> None:
    with pytest.raises(ToolError, match="no-such-tool is not installed"):
        run(["no-such-tool"], confinement=None)
    with pytest.raises(ToolError, match=r"^sh: exit status 3$"):
        run(["sh", "-c", "exit 3"], confinement=None)
    with pytest.raises(ToolError, match=r"^sh: two lines$"):
        run(["sh", "-c", "echo two >&2; echo lines >&2; exit 1"], confinement=None)
    with pytest.raises(ToolError, match=r"sleep did not finish within 0\.1 s"):
        run(["sleep", "60"], confinement=None, timeout=0.1)
    with pytest.raises(ToolError, match="sh: exit status"):
        run(["sh", "-c", "kill -9 $$"], confinement=None)
    with pytest.raises(ImageError, match=r"^no space left on device$"):
        run(["sh", "-c", "echo x: No space left on device >&2; exit 1"], confinement=None)


def test_a_missing_setpriv_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match="setpriv is not installed"):
        run(["true"], confinement=None)
    with pytest.raises(ToolError, match="setpriv is not installed"):
        run_with_progress(["true"], confinement=None, stalled_after=60, pass_fds=[], progress=lambda _: None)


def test_messages_are_in_english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert run(["sh", "-c", "echo $LC_ALL"], confinement=None) == "C\n"


def test_a_tools_own_name_is_not_doubled() -> None:
    assert str(failure("qemu-img", 1, "qemu-img: no such image\n")) == "qemu-img: no such image"


def test_progress_is_reported_as_fractions() -> None:
    seen: list[float] = []
    script = "printf '    (0.00/100%%)\\r    (50.00/100%%)\\r'; sleep 0.2; printf '    (100.00/100%%)\\r\\n'"
    run_with_progress(
        ["sh", "-c", script], confinement=None, stalled_after=60, pass_fds=[], progress=seen.append
    )
    assert seen == [0.0, 0.5, 1.0]
    with pytest.raises(ToolError, match=r"^sh: reason$"):
        run_with_progress(
            ["sh", "-c", "echo reason >&2; exit 1"],
            confinement=None,
            stalled_after=60,
            pass_fds=[],
            progress=seen.append,
        )


def test_a_progress_that_raises_ends_the_tool() -> None:
    def interrupted(_fraction: float) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_with_progress(
            ["sh", "-c", "printf '(1.00/100%%)\\r'; exec sleep 60"],
            confinement=None,
            stalled_after=60,
            pass_fds=[],
            progress=interrupted,
        )
    assert time.monotonic() - start < 10


def test_a_passphrase_is_read_once_and_lies_in_no_file() -> None:
    with passphrase_descriptor(b"secret") as descriptor:
        assert "pipe:" in str(Path(f"/proc/self/fd/{descriptor}").readlink())
        assert (
            run(["cat", f"/proc/self/fd/{descriptor}"], confinement=None, pass_fds=[descriptor]) == "secret"
        )
        assert run(["cat", f"/proc/self/fd/{descriptor}"], confinement=None, pass_fds=[descriptor]) == ""
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_descriptors_are_not_left_open() -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- the listing's own descriptor is in both
    for _ in range(5):
        run(["true"], confinement=None)
        run_with_progress(["true"], confinement=None, stalled_after=60, pass_fds=[], progress=lambda _: None)
        with passphrase_descriptor(b"secret"):
            pass
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 -- likewise


def test_a_tool_dies_with_us(tmp_path: Path) -> None:
    tool = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 60"]
    script = f"from virt_sse.system.tools import run; run({tool}, confinement=None)"
    pid = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_until(lambda: pid.exists() and pid.read_text(), "the tool runs")
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: is_gone(int(pid.read_text())), "the tool has ended", seconds=5)

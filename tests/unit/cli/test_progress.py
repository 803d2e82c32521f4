"""Progress shows rate and time left: a bar on a terminal, lines elsewhere if they are wanted."""

from __future__ import annotations

import contextlib
import os
import pty
import sys

import pytest

from virt_sse.cli.global_options import GlobalOptions, chosen
from virt_sse.cli.output import human_rate, human_time
from virt_sse.cli.progress import _Lines, _Size, progress_bar
from virt_sse.errors import DiskNotFoundError


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in vars(GlobalOptions()).items():
        monkeypatch.setattr(chosen, name, value)


def on_terminal(monkeypatch: pytest.MonkeyPatch, size: int | None) -> str:
    """What a bar prints to a terminal of 120 columns."""
    ours, theirs = pty.openpty()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress_bar("copying", size=size) as progress:
            for percent in range(0, 51, 10):
                progress(percent / 100)
    said = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while chunk := os.read(ours, 4096):
            said += chunk
    os.close(ours)
    return said.decode()


def test_a_bar_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    said = on_terminal(monkeypatch, 1 << 30)
    for part in ("copying", "50%", "iB/s", "left"):
        assert part in said
    assert "B/s" not in on_terminal(monkeypatch, None)


def test_quiet_shows_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen, "quiet", True)
    with progress_bar("copying") as progress:
        assert progress(0.5) is None


def test_without_a_terminal_a_line_now_and_then_if_verbose(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_bar("copying") as progress:
        progress(0.5)
    monkeypatch.setattr(chosen, "verbose", True)
    with progress_bar("copying") as progress:
        progress(0.5)  # not yet
    assert capsys.readouterr().err == ""
    lines = _Lines("copying", _Size(lambda: 1 << 30))
    lines._begun -= 20
    lines._printed -= 20
    lines.report(0.5)
    lines.report(0.6)
    assert capsys.readouterr().err == "virt-sse: copying: 50%, 25.6 MiB/s, 0:20 left\n"


def test_an_operation_without_a_size_has_no_rate() -> None:
    def missing() -> int:
        raise DiskNotFoundError("no disk 'web'")

    assert _Size(missing).get() is None
    assert _Size(None).get() is None
    assert _Size(5).get() == 5


def test_rates_and_times_are_readable() -> None:
    assert [human_rate(each) for each in (0, 1023, 1536, 5 << 30)] == [
        "0 B/s",
        "1023 B/s",
        "1.5 KiB/s",
        "5.0 GiB/s",
    ]
    assert [human_time(each) for each in (0, 61, 3661, 100 * 3600)] == [
        "0:00",
        "1:01",
        "1:01:01",
        "100:00:00",
    ]

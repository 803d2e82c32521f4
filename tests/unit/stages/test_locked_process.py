from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import mode
from support.stage_programs import SLEEP, command_line, say, status, wait_end
from support.waiting import wait_until
from virt_sse.errors import StageError, ToolError
from virt_sse.libvirt.users import User
from virt_sse.stages.locked_process import Command, LockedProcess

_ELSEWHERE = ["unshare", "--pid", "--fork", "--kill-child", "--"]
"""What runs a command in a PID namespace of its own."""


@pytest.fixture
def process(folder: Path) -> Iterator[LockedProcess]:
    process = LockedProcess(folder / "storage")
    yield process
    process.stop()


def script(folder: Path, user: User, body: str) -> list[str]:
    """Another Python that has the same ``process``."""
    return [
        sys.executable,
        "-c",
        "from pathlib import Path\n"
        "from virt_sse.libvirt.users import User\n"
        "from virt_sse.stages.locked_process import Command, LockedProcess\n"
        f"user = User({user.uid}, {user.gid})\n"
        f"process = LockedProcess(Path({str(folder)!r}) / 'storage')\n{body}",
    ]


def test_a_process_is_known_by_its_lock(process: LockedProcess, folder: Path, user: User) -> None:
    assert process.pid() is None
    process.stop()
    process.start(SLEEP, user)
    pid = process.pid()
    assert pid
    wait_until(lambda: command_line(pid) == [shutil.which("sleep"), "60"], "the program runs")
    assert LockedProcess(folder / "storage").pid() == pid
    assert LockedProcess(folder / "cache").pid() is None
    assert {path.name: mode(path) for path in folder.iterdir()} == {
        "storage.lock": 0o600,
        "storage.log": 0o600,
    }
    LockedProcess(folder / "storage").stop()
    assert process.pid() is None
    assert not Path(f"/proc/{pid}/exe").exists()


def test_an_unlocked_file_is_no_process(process: LockedProcess, folder: Path, user: User) -> None:
    process.start(say("exit 0"), user)
    wait_end(process)
    (folder / "storage.lock").write_text(str(os.getpid()))
    with (folder / "storage.lock").open("r+"):
        assert process.pid() is None
        process.stop()


def test_a_process_outlives_its_starter(process: LockedProcess, folder: Path, user: User) -> None:
    body = "process.start(Command(['sleep', '60']), user)\nimport os; os.kill(os.getpid(), 9)"
    assert subprocess.run(script(folder, user, body), check=False).returncode == -signal.SIGKILL
    pid = process.pid()
    assert pid
    assert status(pid)["PPid"] != str(os.getpid())
    assert os.getsid(pid) == pid


def test_a_killed_process_can_be_started_again(process: LockedProcess, user: User) -> None:
    process.start(SLEEP, user)
    first = process.pid()
    assert first
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: process.pid() is None, "the process has ended")
    process.start(SLEEP, user)
    assert process.pid() not in (None, first)


def test_a_running_process_is_not_started_again(process: LockedProcess, user: User) -> None:
    process.start(SLEEP, user)
    pid = process.pid()
    with pytest.raises(StageError, match="cannot start sleep: Resource temporarily unavailable"):
        process.start(SLEEP, user)
    assert process.pid() == pid


def test_a_process_that_ignores_its_end_is_killed(process: LockedProcess, user: User) -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    process.start(Command([os.path.realpath(sys.executable), "-I", "-S", "-c", stubborn]), user)
    wait_until(lambda: process.log == "ready", "the program is ready")
    began = time.monotonic()
    process.stop(patience=0.2)
    assert 0.2 <= time.monotonic() - began < 3
    assert process.pid() is None


def test_a_program_that_does_not_start_is_reported(process: LockedProcess, folder: Path, user: User) -> None:
    with pytest.raises(ToolError, match=r"^no-such-program is not installed$"):
        process.start(Command(["no-such-program"]), user)
    nonsense = folder / "nonsense"
    nonsense.write_bytes(b"\x7fELF")
    nonsense.chmod(0o755)
    process.start(Command([str(nonsense)]), user)
    assert "Exec format error" in wait_end(process)
    process.start(say("echo one; echo two >&2"), user)
    assert wait_end(process) == "one two"
    (folder / "storage.log").unlink()
    (folder / "storage.log").mkdir()
    with pytest.raises(StageError, match=r"cannot start sleep: .*storage\.log"):
        process.start(SLEEP, user)
    (folder / "storage.log").rmdir()


def test_a_process_in_another_pid_namespace_is_not_stopped(
    process: LockedProcess, folder: Path, user: User
) -> None:
    process.start(SLEEP, user)
    body = (
        "from virt_sse.errors import StageError\n"
        "print(process.pid())\n"
        "try: process.stop()\n"
        "except StageError as error: print(error)"
    )
    done = subprocess.run(
        _ELSEWHERE + script(folder, user, body), capture_output=True, text=True, check=False
    )
    if "Operation not permitted" in done.stderr:
        pytest.skip("no right to make a PID namespace")
    assert done.stdout == "0\nthe process of storage runs in another PID namespace\n", done.stderr
    assert process.pid()


def test_a_process_in_a_nested_pid_namespace_is_stopped_by_its_number_here(
    process: LockedProcess, folder: Path, user: User
) -> None:
    body = (
        "process.start(Command(['sleep', '60']), user)\n"
        "print(process.pid(), flush=True)\nimport sys; sys.stdin.read()"
    )
    with subprocess.Popen(
        _ELSEWHERE + script(folder, user, body), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as below:
        assert below.stdout
        there = int(below.stdout.readline())
        here = process.pid()
        assert here
        assert here != there
        assert status(here)["NSpid"].split()[-1] == str(there)
        process.stop()
        assert not Path(f"/proc/{here}/exe").exists()


def test_no_descriptor_is_left_open(process: LockedProcess, user: User) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 -- the listing's own descriptor is in both
    process.start(SLEEP, user)
    process.pid()
    process.stop()
    with pytest.raises(ToolError):
        process.start(Command(["no-such-program"]), user)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 -- likewise

"""What a confined tool can reach, seen by a probe in the tool's place."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.images import require
from support.waiting import wait_until
from virt_sse.errors import ImageError, ToolError
from virt_sse.system.confinement import TOOL_ID, BoundFile, Confinement
from virt_sse.system.tools import run, run_with_progress, running

M = 1 << 20
PROBE = """
import json, os, resource, socket
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
limits = {name: resource.getrlimit(getattr(resource, name)) for name in names}
print(json.dumps({
    "uids": status["Uid"].split(), "gids": status["Gid"].split(), "groups": status["Groups"].split(),
    "capabilities": [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no_new_privs": status["NoNewPrivs"].strip(), "limits": limits, "environment": sorted(os.environ),
    "interfaces": [name for _, name in socket.if_nameindex()],
    "processes": [name for name in os.listdir("/proc") if name.isdigit()],
    "files": [os.path.join(folder, name) for folder, _, names in os.walk("/") for name in names
              if not folder.startswith(("/usr", "/proc", "/dev"))],
    "descriptors": [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if int(entry.name) > 2],
}))
"""
DAC_OVERRIDE = 1 << 1
ROOT = os.geteuid() == 0

needs_bwrap = pytest.mark.skipif(
    not ROOT, reason="needs root: other users may lack the right to make namespaces"
)


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("bwrap", "setpriv", "prlimit")


@contextlib.contextmanager
def bound(path: Path, *, writable: bool = False, name: Path | None = None) -> Iterator[BoundFile]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield BoundFile(name or path, descriptor, writable)
    finally:
        os.close(descriptor)


def python(script: str, confinement: Confinement) -> str:
    return run(["/usr/bin/python3", "-I", "-S", "-c", script], confinement=confinement)


@needs_bwrap
@pytest.mark.root
def test_a_tool_sees_its_files_alone_and_has_one_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "of the caller")
    secret, image = tmp_path / "secret", tmp_path / "image"
    secret.write_text("secret")
    image.write_text("image")
    image.chmod(0o600)
    with bound(image) as file:
        seen = json.loads(python(PROBE, Confinement(files=[file], cpu_seconds=7, written=3 * M)))
    assert seen["uids"] == seen["gids"] == [str(TOOL_ID)] * 4
    assert seen["groups"] == []
    assert seen["capabilities"] == [DAC_OVERRIDE] * 5
    assert seen["no_new_privs"] == "1"
    assert seen["interfaces"] == ["lo"]
    assert set(seen["files"]) - {"/bin", "/lib", "/lib64"} == {str(image), "/etc/ld.so.cache"}
    assert len(seen["processes"]) == 2, "itself and the first process of its namespace"
    assert not [name for name in seen["descriptors"] if str(tmp_path) in name]
    assert {"SECRET", "HOME"}.isdisjoint(seen["environment"])
    limits = seen["limits"]
    assert limits["RLIMIT_CPU"] == [7, 8]
    assert limits["RLIMIT_FSIZE"] == [3 * M] * 2
    assert limits["RLIMIT_AS"] == [2 << 30] * 2
    assert limits["RLIMIT_CORE"] == [0, 0]
    assert limits["RLIMIT_NOFILE"] == [256, 256]


@needs_bwrap
@pytest.mark.root
def test_a_tool_reads_roots_file_and_writes_to_writable_files_only(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_text("image")
    image.chmod(0o600)
    with bound(image) as file:
        assert python(f"print(open('{image}').read())", Confinement(files=[file])) == "image\n"
        with pytest.raises(ToolError, match="Read-only file system"):
            python(f"open('{image}', 'r+')", Confinement(files=[file]))
    with bound(image, writable=True) as file:
        python(f"open('{image}', 'w').write('written')", Confinement(files=[file]))
    assert image.read_text() == "written"
    for place in ("/new", "/dev/new", "/proc/sys/kernel/core_pattern", "/usr/new"):
        with pytest.raises(ToolError, match=r"Read-only|Permission"):
            python(f"open('{place}', 'a').write('')", Confinement())


@needs_bwrap
@pytest.mark.root
def test_a_file_exchanged_after_its_check_is_not_read(tmp_path: Path) -> None:
    image, secret = tmp_path / "image", tmp_path / "secret"
    image.write_text("image")
    secret.write_text("secret")
    with bound(image) as file:
        image.rename(tmp_path / "aside")
        image.symlink_to(secret)
        assert python(f"print(open('{image}').read())", Confinement(files=[file])) == "image\n"
        (tmp_path / "aside").unlink()
        with pytest.raises(ImageError, match="removed or replaced while in use"):
            python("", Confinement(files=[file]))


@needs_bwrap
@pytest.mark.root
def test_a_tool_at_its_limits_is_ended_and_the_limit_named(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.touch()
    with pytest.raises(ToolError, match="MemoryError"):
        python("bytearray(2 << 30)", Confinement())
    with pytest.raises(ToolError, match=r"^sh took too much processor time$"):
        run(["sh", "-c", "while :; do :; done"], confinement=Confinement(cpu_seconds=1))
    with bound(image, writable=True) as file, pytest.raises(ToolError, match=r"^sh wrote more than its file"):
        run(["sh", "-c", f"exec head -c 3000000 /dev/zero > {image}"], confinement=Confinement(files=[file]))
    assert image.stat().st_size <= M
    with pytest.raises(ToolError, match=r"^sleep did not finish within 0\.2 s$"):
        run(["sleep", "60"], confinement=Confinement(), timeout=0.2)
    began = time.monotonic()
    with pytest.raises(ToolError, match=r"^sleep made no progress for 0\.2 s$"):
        run_with_progress(
            ["sleep", "60"],
            confinement=Confinement(),
            pass_fds=[],
            progress=lambda _: None,
            stalled_after=0.2,
        )
    assert time.monotonic() - began < 10


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolError, match=r"^no-such-tool is not installed$"):
        run(["no-such-tool"], confinement=Confinement())
    if ROOT:
        for tool in ("true", "prlimit"):
            (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ToolError, match=r"^bwrap is not installed$") as caught:
            run(["true"], confinement=Confinement())
        assert caught.value.hint is not None
        assert "bubblewrap" in caught.value.hint


def _of(marker: str) -> list[int]:
    """Processes with *marker* among their arguments."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (folder / "cmdline").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@needs_bwrap
@pytest.mark.root
def test_no_tool_outlives_a_killed_caller(tmp_path: Path) -> None:
    marker = f"{60 + os.getpid() / 1e7}"
    script = (
        "from virt_sse.system.tools import run; from virt_sse.system.confinement import Confinement; "
        f"run(['sleep', '{marker}'], confinement=Confinement())"
    )
    with subprocess.Popen([sys.executable, "-c", script]) as parent:
        wait_until(lambda: len(_of(marker)) >= 3, "the tool runs under bwrap")
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not _of(marker), "the tool has ended")


@needs_bwrap
@pytest.mark.root
def test_a_tool_has_ended_when_its_block_has(tmp_path: Path) -> None:
    """Otherwise, a killed tool could still hold the locks of its image."""
    marker = f"{61 + os.getpid() / 1e7}"
    for _ in range(5):
        with running(["sleep", marker], confinement=Confinement(), pass_fds=[]):
            wait_until(lambda: len(_of(marker)) >= 3, "the tool runs under bwrap")
        assert _of(marker) == []


@needs_bwrap
@pytest.mark.root
def test_a_tool_runs_in_a_container() -> None:
    """A process ID inside of the tool's namespaces is no process of the container."""
    script = (
        "from virt_sse.system.tools import run; from virt_sse.system.confinement import Confinement; "
        "print(run(['echo', 'confined'], confinement=Confinement()))"
    )
    container = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--", sys.executable]
    done = subprocess.run([*container, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "confined"

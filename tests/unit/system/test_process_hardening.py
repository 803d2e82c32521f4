"""No entry point leaves its memory in a core file, whatever the limits of the caller."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import images
from support.command_line import PROGRAM, no_libvirt
from support.forking import run_forked
from support.waiting import wait_until
from virt_sse.agent_client import SOCKET
from virt_sse.backend import Backend
from virt_sse.system.process_hardening import protect_memory
from virt_sse.vault.home.settings import Tier
from virt_sse.vault.initialise import initialise

_PR_GET_DUMPABLE = 3
_ABORT_WITH_THE_KEY = """\
import os, sys
from virt_sse_plugins.key_providers.platform_keyring import Keyring
Keyring.parse = lambda *_, **__: os.abort()
sys.argv = sys.argv[1:]
"""
"""Ends the process as a defect in native code does, right after the root key was read."""


@dataclass(frozen=True)
class Cores:
    """:ivar folder: current folder of the processes, where the kernel writes core files."""

    folder: Path
    root: Path

    def start(self, *arguments: str | Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            arguments,
            cwd=self.folder,
            env=os.environ | {"VIRT_SSE_ROOT": str(self.root), "LIBVIRT_DEFAULT_URI": no_libvirt(self.root)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=_unlimited,
        )

    def left(self) -> list[Path]:
        return list(self.folder.iterdir())

    def abort(self, *arguments: str | Path, ready: Callable[[subprocess.Popen[bytes]], object]) -> None:
        """Run the program, and abort the program once *ready* returns."""
        process = self.start(*arguments)
        try:
            ready(process)
            assert _core_limit(process.pid) == ["0", "0"]
            process.send_signal(signal.SIGABRT)
            assert process.wait(30) == -signal.SIGABRT
        finally:
            process.kill()
            process.communicate()


def _unlimited() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _core_limit(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/limits").read_text("ascii").splitlines()
    (line,) = (line for line in lines if line.startswith("Max core file size"))
    return line.removeprefix("Max core file size").split()[:2]


@pytest.fixture
def cores(tmp_path: Path, root: Path) -> Cores:
    """A folder in which this machine's kernel is known to write core files."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    if hard != resource.RLIM_INFINITY and os.geteuid() != 0:
        pytest.skip("the hard limit of core files is not unlimited")
    probing = Cores(tmp_path / "probe", root)
    probing.folder.mkdir()
    probing.start(sys.executable, "-c", "import os; os.abort()").communicate(timeout=30)
    if not probing.left():
        pytest.skip("kernel.core_pattern writes no core file into the current folder")
    folder = tmp_path / "cores"
    folder.mkdir()
    return Cores(folder, root)


@pytest.fixture
def root_key(backend: Backend, root: Path) -> bytes:
    """The platform's root key of an initialised host."""
    return (root / "var/lib/virt-sse/platform-managed/root.key").read_bytes()


def test_a_core_holds_the_root_key_without_protection(cores: Cores, root_key: bytes) -> None:
    """The tests below would fail without protection."""
    unprotected = (
        _ABORT_WITH_THE_KEY + "import virt_sse.cli.main as m; m.protect_memory = lambda: None; m.main()"
    )
    process = cores.start(sys.executable, "-c", unprotected, "virt-sse", "disk", "create", "d", "-s", "1M")
    assert process.wait(60) == -signal.SIGABRT
    process.communicate()
    assert images.contains(cores.left(), root_key)


def test_an_aborted_command_leaves_no_core(cores: Cores, root_key: bytes) -> None:
    program = _ABORT_WITH_THE_KEY + "from virt_sse.cli.main import main; main()"
    process = cores.start(sys.executable, "-c", program, "virt-sse", "disk", "create", "d", "-s", "1M")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGABRT, output
    assert cores.left() == []


def test_an_aborted_hook_leaves_no_core(cores: Cores, root: Path, short_folder: Path) -> None:
    """The hook waits for an agent that never answers."""
    path = root / SOCKET
    path.parent.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as agent, ExitStack() as connections:
        # the test's own folder has too long a path for a socket
        agent.bind(str(short_folder / "agent.sock"))
        path.symlink_to(short_folder / "agent.sock")
        agent.listen()
        agent.settimeout(30)
        cores.abort(
            *(sys.executable, "-I", "-m", "virt_sse.hook", "a domain", "prepare", "begin", "-"),
            ready=lambda _: connections.enter_context(agent.accept()[0]),
        )
    assert cores.left() == []


def test_an_aborted_agent_leaves_no_core(cores: Cores, backend: Backend, root: Path) -> None:
    cores.abort(
        *(PROGRAM, "agent", "run"),
        ready=lambda _: wait_until((root / SOCKET).exists, "the agent serves"),
    )
    assert cores.left() == []


def test_an_aborted_vault_leaves_no_core(cores: Cores, tmp_path: Path) -> None:
    directory = tmp_path / "vault"
    initialise(
        directory,
        tier=Tier.STANDARD,
        hsm={},
        name="vault",
        hosts=("localhost",),
        port=0,
        retention_days=90,
        purge_protection=False,
    )

    def ready(process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stdout.readline()

    cores.abort(PROGRAM, "vault", "serve", "--directory", directory, ready=ready)
    assert cores.left() == []


def test_a_protected_process_is_not_dumpable() -> None:
    def protect() -> None:
        protect_memory()
        assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
        assert ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 0

    assert run_forked(protect) == 0


def test_a_protected_process_still_passes_descriptors_by_proc(tmp_path: Path) -> None:
    """Also without root's privileges: passphrases and unnamed files are named so."""

    def protect() -> None:
        if os.geteuid() == 0:
            os.chown(tmp_path, 65534, 65534)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        protect_memory()
        reading, writing = os.pipe()
        os.write(writing, b"passphrase")
        os.close(writing)
        path = f"/proc/self/fd/{reading}"
        done = subprocess.run(["cat", path], pass_fds=[reading], capture_output=True, check=True)
        assert done.stdout == b"passphrase"
        unnamed = os.memfd_create("unnamed")
        os.close(os.open(f"/proc/self/fd/{unnamed}", os.O_RDWR))

    assert run_forked(protect) == 0

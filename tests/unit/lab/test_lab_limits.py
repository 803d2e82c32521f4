from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.stage_site import Running
from support.waiting import wait_until
from virt_sse.errors import LabError
from virt_sse.lab import cache, limits
from virt_sse.lab.vaults import LabVault


def test_a_program_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! >{tmp_path}/child; echo begun; wait"
    with pytest.raises(LabError, match=r"^the build did not end within 0\.5 s") as failure:
        limits.run_limited(["sh", "-c", script], "the build", 0.5)
    assert failure.value.__notes__ == ["begun\n"]
    child = int((tmp_path / "child").read_text())
    wait_until(lambda: not Running(child).command, "the child ends")


def test_a_lock_of_the_cache_that_another_process_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIRT_SSE_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.1)
    program = "from virt_sse.lab.cache import locked\nwith locked('thing'): print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(LabError, match=r"in vain for the process that holds .*/thing\.lock"),
            cache.locked("thing"),
        ):
            pass
        other.communicate(b"\n")
    with cache.locked("thing"):
        pass


def test_a_vault_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virt_sse.lab.vaults._START_TIMEOUT", 0.2)
    vault = LabVault()
    vault.initialise()
    started = []
    real = subprocess.Popen

    def suspended(*arguments: object, **options: object) -> subprocess.Popen[str]:
        process = real(*arguments, **options)  # type: ignore[call-overload]
        os.kill(process.pid, signal.SIGSTOP)
        started.append(process)
        return process

    monkeypatch.setattr("virt_sse.lab.leashed.subprocess.Popen", suspended)
    try:
        with pytest.raises(LabError, match="the lab vault does not start, or does not answer within"):
            vault.start()
        assert started[0].poll() is not None
    finally:
        vault.remove()

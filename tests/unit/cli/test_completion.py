"""Shell completion, as the shells call for completions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(sys.executable).with_name("virt-sse")


def run(root: Path, *command: str | Path, **environment: str) -> str:
    environment |= {"VIRT_SSE_ROOT": str(root), "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_bash_is_told_the_nouns(tmp_path: Path) -> None:
    nouns = run(tmp_path, PROGRAM, _VIRT_SSE_COMPLETE="complete_bash", COMP_WORDS="virt-sse ", COMP_CWORD="1")
    assert sorted(nouns.split()) == [
        *(
            "agent",
            "audit",
            "certificate",
            "completion",
            "des",
            "disk",
            "host",
            "image",
            "key",
            "snapshot",
            "store",
            "vault",
            "vm",
        ),
        "vmss",
    ]


def test_plugins_commands_are_completed(tmp_path: Path) -> None:
    verbs = run(
        tmp_path, PROGRAM, _VIRT_SSE_COMPLETE="complete_bash", COMP_WORDS="virt-sse vm si", COMP_CWORD="2"
    )
    assert verbs.split() == ["sizes"]


def test_zsh_is_told_verbs_with_their_help(tmp_path: Path) -> None:
    verbs = run(tmp_path, PROGRAM, _VIRT_SSE_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS="virt-sse disk cr")
    assert '"create":' in verbs


def test_fish_is_told_options(tmp_path: Path) -> None:
    options = run(
        tmp_path,
        PROGRAM,
        _VIRT_SSE_COMPLETE="complete_fish",
        _TYPER_COMPLETE_FISH_ACTION="get-args",
        _TYPER_COMPLETE_ARGS="virt-sse disk create --fo",
    )
    assert options.startswith("--format\t")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(tmp_path: Path, shell: str) -> None:
    assert "_VIRT_SSE_COMPLETE=complete_" + shell in run(
        tmp_path, PROGRAM, _VIRT_SSE_COMPLETE=f"source_{shell}"
    )

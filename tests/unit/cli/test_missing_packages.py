"""Commands without the packages of an extra name the extra, in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from virt_sse.cli.main import _NOUNS

PROGRAM = Path(__file__).parents[2] / "support/blocked_packages.py"
EXTRAS = {
    "azure": ["azure", "jwt", "msal"],
    "hsm": ["PyKCS11"],
    "page": ["jinja2", "starlette", "uvicorn"],
    "postgresql": ["psycopg"],
    "vault": ["jwt", "starlette", "uvicorn"],
}
NEEDING = {
    "azure": [("key", "list"), ("key", "create", "web")],
    "hsm": [
        ("host", "hsm", "list"),
        ("host", "hsm", "create", "k"),
        ("des", "create", "d", "--provider", "hsm-simulated", "--key", "k"),
    ],
    "page": [("agent", "page")],
    "postgresql": [("store", "migrate", "postgresql+psycopg://x@/y?host=/nowhere")],
    "vault": [
        ("vault", "init", "--directory", "vault"),
        ("vault", "serve", "--directory", "vault"),
    ],
}


def run(folder: Path, packages: list[str], commands: list[tuple[str, ...]]) -> list[tuple[int, str]]:
    """Exit status and error text of commands in which *packages* cannot be imported."""
    done = subprocess.run(
        [sys.executable, PROGRAM, ",".join(packages)],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env=os.environ | {"VIRT_SSE_ROOT": str(folder)},
    )
    return [(status, said) for status, said in json.loads(done.stdout)]


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_command_names_the_extra_that_it_needs(tmp_path: Path, extra: str) -> None:
    results = run(tmp_path, EXTRAS[extra], NEEDING[extra])
    for command, (status, said) in zip(NEEDING[extra], results, strict=True):
        assert "Traceback" not in said, said
        assert status == 1, (command, said)
        assert len(said.splitlines()) == 2, (command, said)
        assert f"pip install 'virt-sse[{extra}]'" in said, (command, said)


def test_without_any_extra_all_help_is_there(tmp_path: Path) -> None:
    packages = sorted({package for each in EXTRAS.values() for package in each})
    commands = [(noun, "--help") for noun in _NOUNS] + [("vault", "init", "--help"), ("disk", "list")]
    assert run(tmp_path, packages, commands) == [(0, "")] * len(commands)

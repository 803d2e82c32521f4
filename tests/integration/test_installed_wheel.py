"""virt-sse from a wheel, in fresh environments: the lab, the contract suite and the documents' projects."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.folders import REPOSITORY
from support.wheels import built_wheel, fresh_environment, pip, write_files_of

_PROBE = """
from virt_sse.lab.recipes import vm_images


def test_vault(lab_vault): ...


def test_token(lab_token): ...


def test_recipes():
    assert vm_images().parts[-3:] == ("virt_sse", "lab", "vm-images")
    assert {path.name for path in vm_images().glob("*/build")} == {"build"}
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_wheel(tmp_path_factory.mktemp("wheel"))


def run_pytest(python: Path, folder: Path, *arguments: str) -> str:
    """Run pytest in *folder*, with nothing of the checkout in the environment; the output."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))
    }
    environment["PATH"] = f"{python.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_a_plugins_project_runs_the_contract_suite(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv", "virt-sse", "pytest", "setuptools")
    write_files_of(REPOSITORY / "plugins/README.md", tmp_path)
    project = tmp_path / "kek-file"
    pip("install", "--no-deps", wheel, python=python)
    pip("install", "--no-deps", "--no-build-isolation", project, python=python)
    assert "2 passed" in run_pytest(python, project)
    said = run_pytest(python, project, "--pyargs", "virt_sse.contract")
    assert "passed" in said
    assert "the keys of 'kek-file' cannot be disabled" in said

    (tmp_path / "probe.py").write_text(_PROBE)
    said = run_pytest(python, tmp_path, "probe.py")
    assert "pip install 'virt-sse[vault]'" in said
    assert "pip install 'virt-sse[hsm]'" in said
    assert "1 passed, 2 skipped" in said

    (project / "conftest.py").unlink()
    with pytest.raises(AssertionError, match="override the fixture 'key_provider_bench'"):
        run_pytest(python, project, "--pyargs", "virt_sse.contract", "-k", "has_the_name")


@pytest.mark.slow
@pytest.mark.libvirt
@pytest.mark.kvm
@pytest.mark.usefixtures("as_root")
def test_a_labs_project_boots_a_guest_from_an_encrypted_disk(wheel: Path, tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "venv", "virt-sse[lab]", "pytest")
    pip("install", "--no-deps", wheel, python=python)
    write_files_of(REPOSITORY / "backend/docs/guides/lab.md", tmp_path)
    assert "1 passed" in run_pytest(python, tmp_path / "lab-project")

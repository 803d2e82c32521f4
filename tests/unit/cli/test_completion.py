"""Shell completion, as the shells call for completions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.command_line import PROGRAM, no_libvirt
from support.loaded_commands import run_command
from virt_sse.backend import Backend
from virt_sse.cli import shell_files
from virt_sse.cli.completion import Shell, _fitting, script
from virt_sse.model.disks import NewDisk


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


def test_the_completion_command_prints_the_script_of_each_shell(tmp_path: Path) -> None:
    printed = run(tmp_path, PROGRAM, "completion", "zsh")
    assert printed.rstrip() == script(Shell.ZSH)
    for shell in Shell:
        assert "_VIRT_SSE_COMPLETE=complete_" + shell.value in script(shell)


def completions(root: Path, line: str) -> list[str]:
    """The completions of *line* for bash, which must print nothing to standard error."""
    environment = {
        "_VIRT_SSE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(line.count(" ")),
    }
    where = {"VIRT_SSE_ROOT": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)}
    done = run_command([], os.environ | environment | where)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_names_of_disks_and_sets_come_from_the_store(root: Path, backend: Backend) -> None:
    for name in ("web", "web-2", "data"):
        backend.disks.create(NewDisk(name=name, size=1 << 20))
    backend.sets.create("payroll", provider="platform-managed", key="default")
    assert completions(root, "virt-sse disk show we") == ["web", "web-2"]
    assert completions(root, "virt-sse disk create new --des ") == ["payroll"]
    assert completions(root, "virt-sse des show p") == ["payroll"]
    assert completions(root, "virt-sse snapshot create now --disk d") == ["data"]
    assert completions(root, "virt-sse vm show ") == []  # there is no libvirt


def test_a_store_that_cannot_be_read_completes_nothing(root: Path, backend: Backend) -> None:
    store = Path(backend.host.config.store_url.removeprefix("sqlite:///"))
    backend.disks.create(NewDisk(name="web", size=1 << 20))
    backend.host.store.close()
    store.write_bytes(b"damaged" * 1000)
    for extra in store.parent.glob(f"{store.name}-*"):
        extra.unlink()
    assert completions(root, "virt-sse disk show w") == []
    store.unlink()
    assert completions(root, "virt-sse disk show w") == []
    assert not store.exists()


def test_an_invalid_configuration_completes_nothing(root: Path) -> None:
    file = root / "etc/virt-sse/config.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("nonsense")
    assert completions(root, "virt-sse disk sh") == []


@pytest.mark.parametrize(
    "name", ["$(id)", "a b", "a;b", "a'b", 'a"b', "`id`", "a\nb", "-rf", "a*", "a)", "~"]
)
def test_a_name_with_a_meaning_for_a_shell_is_not_completed(name: str) -> None:
    assert _fitting(lambda: [name, "web"], "") == ["web"]


@pytest.mark.parametrize("shell", Shell)
def test_a_shell_completes_with_the_installed_script(root: Path, backend: Backend, shell: Shell) -> None:
    if not shutil.which(shell.value):
        pytest.skip(f"needs {shell.value}")
    backend.disks.create(NewDisk(name="web", size=1 << 20))
    assert any(shell.value in each for each in shell_files.install(root))
    share = root / "usr/local/share"
    program = {
        Shell.BASH: f"""
            source {share}/bash-completion/completions/virt-sse
            COMP_WORDS=(virt-sse disk show w) COMP_CWORD=3
            _virt_sse_completion virt-sse
            echo "${{COMPREPLY[@]}}"
        """,
        Shell.FISH: f"""
            source {share}/fish/vendor_completions.d/virt-sse.fish
            complete --do-complete 'virt-sse disk show w'
        """,
        Shell.ZSH: f"""
            fpath=({share}/zsh/site-functions $fpath)
            autoload -Uz compinit && compinit -u -d {root}/zcompdump
            _arguments() {{ echo "$@" }}
            words=(virt-sse disk show w) CURRENT=4
            $_comps[virt-sse]
        """,
    }[shell]
    environment = {"HOME": str(root), "XDG_CONFIG_HOME": str(root), "LIBVIRT_DEFAULT_URI": no_libvirt(root)}
    said = run(root, shell.value, "-c", program, **environment)
    assert re.search(r"\bweb\b", said), said
    assert shell_files.install(root) == []


def test_what_host_init_installs_for_shells_can_be_removed(root: Path) -> None:
    shell_files.install(root)
    man = root / "usr/local/share/man/man1"
    assert (man / "virt-sse-disk.1").stat().st_mode & 0o777 == 0o644
    (man / "other.1").touch()
    removed = shell_files.installed(root)
    for path in removed:
        path.unlink()
    left = [path for path in (root / "usr").rglob("*") if path.is_file()]
    assert left == [man / "other.1"]
    assert len(removed) == 3 + 15
    assert shell_files.installed(root) == []

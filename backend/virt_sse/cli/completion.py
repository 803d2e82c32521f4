"""``virt-sse completion``, and the answers to a shell that completes a command line.

The scripts are typer's. A shell runs ``virt-sse`` with the words so far in its environment. Then nothing is
printed to standard error, and nothing is changed: names come from the store and from libvirt as they are.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
from collections.abc import Callable, Iterable
from typing import Annotated, Never

import typer

from virt_sse.cli import session
from virt_sse.errors import VirtSseError

_INSTRUCTION = "_VIRT_SSE_COMPLETE"
_WORDS = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
_ZSH_AUTOLOADED = """
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
  _virt_sse_completion "$@"
else
  compdef _virt_sse_completion virt-sse
fi"""
"""zsh runs a file of ``$fpath`` at the first completion, and takes its result for the completions."""
_HARMLESS = re.compile(r"[A-Za-z0-9@+=%_][A-Za-z0-9@+=%_.:-]*", re.ASCII)
"""Names that mean nothing to a shell: zsh evaluates the answer as code."""


class Shell(enum.Enum):
    """Values of the argument of ``completion``."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="bash|zsh|fish", help="The shell.", show_default=False)],
) -> None:
    """Print the script that completes commands, options and names in a shell. 'host init' installs it."""
    typer.echo(script(shell))


def script(shell: Shell) -> str:
    """The script for *shell*."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]

    text = str(get_completion_script(prog_name="virt-sse", complete_var=_INSTRUCTION, shell=shell.value))
    return text.replace("\ncompdef _virt_sse_completion virt-sse", _ZSH_AUTOLOADED)


def is_wanted() -> bool:
    """Whether a shell asks for completions."""
    return _INSTRUCTION in os.environ


def words() -> list[str]:
    """The words of the command line to be completed, as far as blanks separate them."""
    return [word for name in _WORDS for word in os.environ.get(name, "").split()]


def answer(app: typer.Typer) -> Never:
    """Print the completions that the shell asks for, and exit."""
    from typer.completion import completion_init  # type: ignore[attr-defined]

    completion_init()
    with contextlib.suppress(Exception):
        typer.main.get_command(app).main(prog_name="virt-sse")
    raise SystemExit(0)


def disks(incomplete: str) -> list[str]:
    """Names of disks."""
    return _stored("disk", incomplete)


def deleted_disks(incomplete: str) -> list[str]:
    """Names of deleted disks."""
    return _stored("disk", incomplete, is_deleted=True)


def snapshots(incomplete: str) -> list[str]:
    """Names of snapshots."""
    return _stored("snapshot", incomplete)


def images(incomplete: str) -> list[str]:
    """Names of images, with their versions."""
    return _stored("image", incomplete)


def restore_points(incomplete: str) -> list[str]:
    """Names of restore points."""
    return _stored("restore-point", incomplete)


def encryption_sets(incomplete: str) -> list[str]:
    """Names of disk encryption sets."""
    return _fitting(_set_names, incomplete)


def domains(incomplete: str) -> list[str]:
    """Names of libvirt's domains."""
    return _fitting(_domain_names, incomplete)


def _stored(kind: str, incomplete: str, *, is_deleted: bool = False) -> list[str]:
    return _fitting(lambda: _disk_names(kind, is_deleted), incomplete)


def _fitting(names: Callable[[], Iterable[str]], incomplete: str) -> list[str]:
    """The harmless names that begin with *incomplete*; none if they cannot be read."""
    try:
        return [name for name in names() if name.startswith(incomplete) and _HARMLESS.fullmatch(name)]
    except (VirtSseError, OSError):
        return []


def _disk_names(kind: str, is_deleted: bool) -> list[str]:
    from virt_sse.model.disk_kind import DiskKind

    with session.existing_store() as store:
        return store.names(DiskKind(kind), is_deleted=is_deleted) if store else []


def _set_names() -> list[str]:
    with session.existing_store() as store:
        return store.encryption_set_names() if store else []


def _domain_names() -> list[str]:
    from virt_sse.libvirt.connection import connected

    with connected(session.config().libvirt_uri) as connection:
        return sorted(domain.name() for domain in connection.listAllDomains())

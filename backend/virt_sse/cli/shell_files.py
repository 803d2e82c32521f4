"""Completion scripts and man pages on a host, where shells and man(1) look for a site's own files."""

from __future__ import annotations

from pathlib import Path

from virt_sse.cli.completion import Shell, script
from virt_sse.errors import ConfigError
from virt_sse.system.files import shared_folder, write_shared

_SHARE = "usr/local/share"
_SCRIPTS = {
    Shell.BASH: "bash-completion/completions/virt-sse",
    Shell.ZSH: "zsh/site-functions/_virt-sse",
    Shell.FISH: "fish/vendor_completions.d/virt-sse.fish",
}
_MAN_PAGES = "man/man1"


def install(root: Path) -> list[str]:
    """Write completion scripts and man pages below *root*; older ones are replaced.

    :return: what is new or changed, in words.
    :raise ConfigError: When a file cannot be written.
    """
    share = root / _SHARE
    changed = {path.parent for path, content in _files(share).items() if _write(path, content)}
    made = [
        f"completion for {shell.value} in {share / path}"
        for shell, path in _SCRIPTS.items()
        if (share / path).parent in changed
    ]
    return made + ([f"man pages in {share / _MAN_PAGES}"] if share / _MAN_PAGES in changed else [])


def installed(root: Path) -> list[Path]:
    """What :func:`install` has written below *root*, also that of another version."""
    share = root / _SHARE
    files = [*(share / each for each in _SCRIPTS.values()), *sorted((share / _MAN_PAGES).glob("virt-sse*.1"))]
    return [path for path in files if path.exists()]


def _files(share: Path) -> dict[Path, bytes]:
    from virt_sse.cli.reference import command_line
    from virt_sse.cli.roff import man_pages

    files = {share / path: f"{script(shell)}\n".encode() for shell, path in _SCRIPTS.items()}
    pages = man_pages(command_line())
    return files | {share / _MAN_PAGES / name: page.encode("ascii") for name, page in pages.items()}


def _write(path: Path, content: bytes) -> bool:
    """Write a file unless it has this content: whether it was written."""
    try:
        if path.exists() and path.read_bytes() == content:
            return False
        shared_folder(path.parent)
        write_shared(path, content)
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
    return True

"""A search for secrets, in every spelling, in files and in processes' arguments and environments."""

from __future__ import annotations

import base64
import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

LEAST = 12
"""Bytes of the shortest spelling: a shorter one would be found by chance."""


def spellings(secret: bytes) -> set[bytes]:
    """Every form in which *secret* could be written.

    Raw; hexadecimal; base64 at each of the three alignments, also for URLs; escaped by JSON and by Python;
    each of these in UTF-16, too.
    """
    texts = {
        secret.hex(),
        secret.hex().upper(),
        repr(secret)[2:-1],
        json.dumps(secret.decode("latin-1"))[1:-1],
    }
    for before in range(3):
        # Only whole groups of three bytes are spelled the same whatever stands before and behind.
        inner = secret[(3 - before) % 3 :]
        inner = inner[: len(inner) // 3 * 3]
        texts |= {base64.b64encode(inner).decode(), base64.urlsafe_b64encode(inner).decode()}
    found = {secret, *(text.encode() for text in texts)}
    with contextlib.suppress(UnicodeDecodeError):
        texts.add(secret.decode())
    found |= {text.encode(code) for text in texts for code in ("utf-16-le", "utf-16-be")}
    return {each for each in found if len(each) >= LEAST}


class Canaries:
    """Secrets by name, to be searched for."""

    def __init__(self) -> None:
        self._spelled: dict[str, set[bytes]] = {}

    def add(self, name: str, secret: bytes) -> None:
        assert len(secret) >= LEAST, f"{name} would be found by chance"
        self._spelled[name] = spellings(secret)

    def names(self) -> set[str]:
        return set(self._spelled)

    def within(self, content: bytes) -> set[str]:
        """The names of the secrets in *content*."""
        return {name for name, spelled in self._spelled.items() if any(each in content for each in spelled)}

    def in_files(self, *folders: Path) -> Mapping[str, set[Path]]:
        """The files below *folders* that hold a secret, by the secret's name."""
        return _by_name((path, self.within(content)) for path, content in _files(folders))

    def in_processes(self) -> Mapping[str, set[Path]]:
        """The command lines and environments of this machine that hold a secret, by the secret's name."""
        return _by_name((path, self.within(content)) for path, content in _processes())


def _by_name(found: Iterable[tuple[Path, set[str]]]) -> Mapping[str, set[Path]]:
    paths: dict[str, set[Path]] = {}
    for path, names in found:
        for name in names:
            paths.setdefault(name, set()).add(path)
    return paths


def _files(folders: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and not path.is_symlink():
                    yield path, path.read_bytes()


def _processes() -> Iterator[tuple[Path, bytes]]:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    yield process / name, (process / name).read_bytes()

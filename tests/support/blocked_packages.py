"""A program: runs the commands of a JSON list on standard input, none of which can import some packages.

Prints a JSON list of exit status and error text of each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Blocker:
    """Finds no module of some packages, as if they were not installed."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in self._packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def main() -> None:
    sys.meta_path.insert(0, _Blocker(sys.argv[1].split(",")))
    from virt_sse.cli.main import main as run

    results = []
    for command in json.load(sys.stdin):
        with tempfile.TemporaryFile("w+") as errors:
            if not (pid := os.fork()):
                os.dup2(os.open(os.devnull, os.O_RDWR), 1)
                os.dup2(errors.fileno(), 2)
                sys.argv = ["virt-sse", *command]
                run()
                sys.exit()
            _, status = os.waitpid(pid, 0)
            errors.seek(0)
            results.append((os.waitstatus_to_exitcode(status), errors.read()))
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

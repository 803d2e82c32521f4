"""Tracebacks of expected errors, for ``--debug``."""

from __future__ import annotations

import contextlib
import re
import sys

from virt_sse.errors import printable

_PASSWORD = re.compile(r"(://[^/\s:@]*):[^/\s@]*@")


def print_traceback(error: Exception) -> None:
    """Print where *error* was raised, and its causes, to standard error.

    Tracebacks show code and messages, never the values of variables. Messages of libraries may name a URL:
    its password is left out.
    """
    import traceback

    text = _PASSWORD.sub(r"\1:***@", "".join(traceback.format_exception(error)))
    with contextlib.suppress(OSError):
        print("\n".join(printable(line) for line in text.splitlines()), file=sys.stderr)  # noqa: T201 -- the edge

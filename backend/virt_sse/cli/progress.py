"""Progress of long operations on standard error: a bar with rate and time left, or lines now and then."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import typer

from virt_sse.cli.global_options import chosen
from virt_sse.cli.output import human_rate, human_time
from virt_sse.errors import VirtSseError

if TYPE_CHECKING:
    from virt_sse.system.progress import Progress

_LINE_SECONDS = 10.0
_RATE_SECONDS = 300.0
"""The rate is measured over the last minutes: qemu-img reports in steps of one percent."""


@contextlib.contextmanager
def progress_bar(what: str, *, size: int | Callable[[], int | None] | None = None) -> Iterator[Progress]:
    """Show the progress of an operation: on a terminal, a bar with the time left and, given a size, the rate.

    Without a terminal, nothing is shown, and with ``--verbose`` a line every ten seconds. With ``--quiet``,
    nothing is shown.

    :param size: bytes of the whole operation; a callable is asked once the operation has begun, and may raise
        :class:`VirtSseError`.
    """
    if chosen.quiet or not (sys.stderr.isatty() or chosen.verbose or chosen.debug):
        yield lambda _fraction: None
    elif not sys.stderr.isatty():
        yield _Lines(what, _Size(size)).report
    else:
        with _bar(what, _Size(size)) as report:
            yield report


class _Size:
    """The bytes of an operation, looked up when needed."""

    def __init__(self, size: int | Callable[[], int | None] | None) -> None:
        self._size = size

    def get(self) -> int | None:
        if callable(self._size):
            try:
                self._size = self._size()
            except VirtSseError:
                self._size = None  # an operation without a size, or a disk not yet in the store
        return self._size


class _Lines:
    """A line every ten seconds."""

    def __init__(self, what: str, size: _Size) -> None:
        self._what = what
        self._size = size
        self._begun = self._printed = time.monotonic()

    def report(self, fraction: float) -> None:
        """Note the completed fraction (:data:`Progress`)."""
        now = time.monotonic()
        if now - self._printed < _LINE_SECONDS or not 0 < fraction <= 1:
            return
        self._printed = now
        passed = now - self._begun
        words = [f"{self._what}: {fraction:.0%}"]
        if size := self._size.get():
            words.append(human_rate(size * fraction / passed))
        words.append(f"{human_time(passed * (1 - fraction) / fraction)} left")
        typer.echo(f"virt-sse: {', '.join(words)}", err=True)


@contextlib.contextmanager
def _bar(what: str, size: _Size) -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        """Bytes a second."""

        def render(self, task: Task) -> Text:
            whole = size.get() if task.completed else None
            return Text(human_rate(task.speed * whole) if task.speed and whole else "")

    class TimeLeft(ProgressColumn):
        """Time until the end, at the present rate."""

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            return Text("" if left is None or task.finished else f"{human_time(left)} left")

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), Rate(), TimeLeft())
    console = Console(stderr=True)
    with Bars(*columns, console=console, transient=True, speed_estimate_period=_RATE_SECONDS) as bars:
        task = bars.add_task(what, total=1.0)
        yield lambda fraction: bars.update(task, completed=fraction)

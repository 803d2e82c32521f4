"""External tools: run as subprocesses, with passphrases passed through pipes.

Every call states a :class:`~virt_sse.system.confinement.Confinement`, or ``None`` for a tool that reads no
image but those made by this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from virt_sse.errors import ImageError, ToolError, printable
from virt_sse.system.confinement import Confinement, command, has_mounts, tool_environment
from virt_sse.system.leash import leashed

_log = logging.getLogger(__name__)

STEP = 15
"""Log level between ``DEBUG`` and ``INFO``: tools that were run, and their time."""

_COMMAND_NOT_FOUND = 127
"""Exit status of sh and setpriv when the tool is not found."""
_LIMITS = {
    128 + signal.SIGXCPU: "took too much processor time",
    128 + signal.SIGXFSZ: "wrote more than its file may hold",
}
"""Exit statuses of bwrap for a tool that was ended at a limit."""
_FILE_GONE = ("Can't find source path", "Race condition binding")
"""bwrap's words for a bound file that no longer has its name."""
_ENDING_SECONDS = 2.0
_MOST_ERRORS = 1 << 16


def run(
    arguments: Sequence[str],
    *,
    confinement: Confinement | None,
    stdin: bytes = b"",
    pass_fds: Sequence[int] = (),
    timeout: float | None = None,
) -> str:
    """Run a tool to completion and return its standard output.

    The tool is killed when the calling thread ends: a killed command leaves no process behind.

    :raise ImageError: When the tool fails because the disk is full.
    :raise ToolError: When the tool is missing, fails, or takes longer than *timeout* seconds.
    """
    with _started(
        arguments,
        confinement,
        pass_fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            output, errors = process.communicate(stdin, timeout)
        except subprocess.TimeoutExpired as exc:
            raise ToolError(f"{arguments[0]} did not finish within {timeout:g} s") from exc
    if process.returncode != 0:
        raise failure(arguments[0], process.returncode, errors.decode(errors="replace"))
    return output.decode(errors="replace")


def run_with_progress(
    arguments: Sequence[str],
    *,
    confinement: Confinement | None,
    pass_fds: Sequence[int],
    progress: Callable[[float], None],
    stalled_after: float,
) -> None:
    """Run a qemu-img command with ``-p`` and report the completed fraction, from 0.0 to 1.0.

    :param stalled_after: seconds without progress, which qemu-img reports in steps of 1 %, until the tool is
        killed.
    :raise ImageError: When the tool fails because the disk is full.
    :raise ToolError: When the tool is missing, fails or stalls.
    """
    with (
        os.fdopen(os.memfd_create("stderr"), "w+b") as errors,
        _started(
            arguments, confinement, pass_fds, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101 -- PIPE above
        pending = b""
        while select.select([process.stdout], [], [], stalled_after)[0]:
            if not (chunk := os.read(process.stdout.fileno(), 4096)):
                break
            *lines, pending = (pending + chunk).replace(b"\n", b"\r").split(b"\r")
            for line in lines:
                with contextlib.suppress(ValueError):
                    progress(float(line.strip().removeprefix(b"(").removesuffix(b"/100%)")) / 100)
        else:
            raise ToolError(f"{arguments[0]} made no progress for {stalled_after:g} s")
        if process.wait() != 0:
            errors.seek(0)
            raise failure(arguments[0], process.returncode, errors.read().decode(errors="replace"))


class Running:
    """A running tool."""

    def __init__(self, tool: str, process: subprocess.Popen[bytes], errors: BinaryIO) -> None:
        self._tool = tool
        self._process = process
        self._errors = errors

    def failure(self) -> ImageError | ToolError | None:
        """The reason why the tool ended, waiting two seconds for its end; ``None`` while the tool runs."""
        try:
            status = self._process.wait(_ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            return None
        self._errors.seek(0)
        return failure(self._tool, status, self._errors.read(_MOST_ERRORS).decode(errors="replace"))


@contextlib.contextmanager
def running(
    arguments: Sequence[str], *, confinement: Confinement | None, pass_fds: Sequence[int]
) -> Iterator[Running]:
    """Run a tool during the block and kill the tool at the end of the block or of the calling thread.

    :raise ToolError: When the tool is missing. A failure of the tool itself: see :meth:`Running.failure`.
    """
    with (
        os.fdopen(os.memfd_create("stderr"), "w+b") as errors,
        _started(
            arguments,
            confinement,
            pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        ) as process,
    ):
        yield Running(arguments[0], process, errors)


@contextlib.contextmanager
def _started(
    arguments: Sequence[str],
    confinement: Confinement | None,
    pass_fds: Sequence[int],
    *,
    stdin: int,
    stdout: int,
    stderr: int | BinaryIO,
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a tool; at the end of the block, kill the tool and wait until the tool has ended."""
    if confinement is None:
        wrapped, environment = list(arguments), {**os.environ, "LC_ALL": "C"}
    else:
        wrapped, environment = command(arguments, confinement, pass_fds), tool_environment()
        pass_fds = [*pass_fds, *confinement.descriptors]
    _log.debug("run: %s", printable(shlex.join(arguments)))
    started = time.monotonic()
    with leashed(
        wrapped,
        in_namespace=confinement is not None and has_mounts(),
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        pass_fds=pass_fds,
        environment=environment,
    ) as process:
        yield process
    _log.log(
        STEP,
        "%s ran for %.2f s, exit status %s",
        arguments[0],
        time.monotonic() - started,
        process.returncode,
    )


def failure(tool: str, status: int, stderr: str) -> ImageError | ToolError:
    """The error for a tool's exit status and standard error."""
    if status == _COMMAND_NOT_FOUND:
        return ToolError(f"{tool} is not installed")
    if limit := _LIMITS.get(status if status > 0 else 128 - status):
        return ToolError(f"{tool} {limit}")
    reason = " ".join(stderr.split()) or f"exit status {status}"
    if reason.startswith("bwrap: "):
        if any(sign in reason for sign in _FILE_GONE):
            return ImageError("the image was removed or replaced while in use")
        return ToolError(f"cannot confine {tool}: {reason}")
    if "No space left on device" in reason:
        return ImageError("no space left on device")
    return ToolError(f"{tool}: {reason.removeprefix(f'{tool}: ')}")


@contextlib.contextmanager
def passphrase_descriptor(passphrase: bytes) -> Iterator[int]:
    """A descriptor from which a child can read *passphrase* once: a pipe, so no file holds the secret."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(writing, passphrase)
        os.close(writing)
        yield reading
    finally:
        os.close(reading)

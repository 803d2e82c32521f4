"""External tools: run as subprocesses, with passphrases passed through pipes."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

from virt_sse.errors import ImageError, ToolError
from virt_sse.system import acceleration

_COMMAND_NOT_FOUND = 127
"""Exit status of setpriv when the tool is not found."""
_ENDING_SECONDS = 2.0
_MOST_ERRORS = 1 << 16


def run(
    arguments: Sequence[str],
    *,
    stdin: bytes = b"",
    pass_fds: Sequence[int] = (),
    timeout: float | None = None,
) -> str:
    """Run a tool to completion and return its standard output.

    The tool is killed when the calling thread ends (``setpriv --pdeathsig``): a killed command leaves no
    process behind.

    :raise ImageError: When the tool fails because the disk is full.
    :raise ToolError: When the tool is missing, fails, or takes longer than *timeout* seconds.
    """
    try:
        done = subprocess.run(
            _leashed(arguments),
            input=stdin,
            capture_output=True,
            pass_fds=pass_fds,
            timeout=timeout,
            check=False,
            env=_environment(arguments[0]),
        )
    except FileNotFoundError as exc:
        raise ToolError("setpriv is not installed") from exc
    except subprocess.TimeoutExpired as exc:
        raise ToolError(f"{arguments[0]} did not finish within {timeout:g} s") from exc
    if done.returncode != 0:
        raise failure(arguments[0], done.returncode, done.stderr.decode(errors="replace"))
    return done.stdout.decode(errors="replace")


def run_with_progress(
    arguments: Sequence[str], *, pass_fds: Sequence[int], progress: Callable[[float], None]
) -> None:
    """Run a qemu-img command with ``-p`` and report the completed fraction, from 0.0 to 1.0.

    :raise ImageError: When the tool fails because the disk is full.
    :raise ToolError: When the tool is missing or fails.
    """
    with contextlib.ExitStack() as stack:
        errors = stack.enter_context(os.fdopen(os.memfd_create("stderr"), "w+b"))
        try:
            process = stack.enter_context(
                subprocess.Popen(
                    _leashed(arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    pass_fds=pass_fds,
                    env=_environment(arguments[0]),
                )
            )
        except FileNotFoundError as exc:
            raise ToolError("setpriv is not installed") from exc
        stack.callback(process.kill)
        assert process.stdout is not None  # noqa: S101 -- PIPE above
        pending = b""
        while chunk := os.read(process.stdout.fileno(), 4096):
            *lines, pending = (pending + chunk).replace(b"\n", b"\r").split(b"\r")
            for line in lines:
                with contextlib.suppress(ValueError):
                    progress(float(line.strip().removeprefix(b"(").removesuffix(b"/100%)")) / 100)
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
def running(arguments: Sequence[str], *, pass_fds: Sequence[int]) -> Iterator[Running]:
    """Run a tool during the block and kill the tool at the end of the block or of the calling thread.

    :raise ToolError: When setpriv is missing. A failure of the tool itself: see :meth:`Running.failure`.
    """
    with os.fdopen(os.memfd_create("stderr"), "w+b") as errors:
        try:
            process = subprocess.Popen(
                _leashed(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=pass_fds,
                env=_environment(arguments[0]),
            )
        except FileNotFoundError as exc:
            raise ToolError("setpriv is not installed") from exc
        with process:
            try:
                yield Running(arguments[0], process, errors)
            finally:
                process.kill()


def failure(tool: str, status: int, stderr: str) -> ImageError | ToolError:
    """The error for a tool's exit status and standard error."""
    if status == _COMMAND_NOT_FOUND:
        return ToolError(f"{tool} is not installed")
    reason = " ".join(stderr.split()) or f"exit status {status}"
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


def _leashed(arguments: Sequence[str]) -> list[str]:
    return ["setpriv", "--pdeathsig", "KILL", "--", *arguments]


def _environment(tool: str) -> dict[str, str]:
    """The environment with English messages, because virt-sse parses some."""
    found = {**os.environ, "LC_ALL": "C"}
    if tool.startswith("qemu-"):
        found |= acceleration.environment(found)
    return found

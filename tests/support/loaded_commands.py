"""Runs ``virt-sse`` in processes forked from one that has loaded its modules: this halves their CPU time.

Each command has a process of its own, with its own environment, working folder and standard streams. How a
command loads what it needs, and ends, is tested with the installed script (``unit/test_hook_imports.py``).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NoReturn

PROGRAM = Path(sys.executable).with_name("virt-sse")
_LOADED = ("virt_sse.backend", "virt_sse.cli.main", "virt_sse.store.engine", "alembic.runtime.migration")
_AT_START = ("PYTHON", "LC_", "LANG", "LD_", "MALLOC_")
"""Variables that a process reads at its start, by their first letters."""
_LONGEST = 1 << 20
_STARTING = threading.Lock()
_IN_NAMESPACES: list[subprocess.Popen[bytes]] = []


def run_command(
    arguments: Sequence[str | bytes | Path],
    environment: Mapping[str, str],
    *,
    together: bool = False,
    seconds: float = 60,
    inside: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run ``virt-sse`` with *arguments*, without standard input.

    :param together: whether standard error goes to standard output.
    :param inside: the beginning of a command that runs in other namespaces, e.g. a lab host's.
    :raise subprocess.TimeoutExpired: After *seconds*; the process is killed.
    """
    if _at_start(environment) != _at_start(os.environ):
        return subprocess.run(
            [*inside, PROGRAM, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if together else subprocess.PIPE,
            text=True,
            timeout=seconds,
            check=False,
        )
    typed = [os.fsdecode(argument) for argument in arguments]
    request = {"arguments": typed, "environment": dict(environment), "folder": os.getcwd()}  # noqa: PTH109
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        Path(os.devnull).open() as nothing,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
    ):
        connection.connect(start(inside))
        connection.settimeout(seconds)
        content = json.dumps(request).encode()
        socket.send_fds(
            connection, [content], [nothing.fileno(), out.fileno(), (out if together else err).fileno()]
        )
        try:
            status = int(connection.recv(64))
        except TimeoutError as exc:  # the server kills the command
            raise subprocess.TimeoutExpired(typed, seconds) from exc
        out.seek(0)
        err.seek(0)
        said = [stream.read().decode("utf-8", "surrogateescape") for stream in (out, err)]
    if not together:
        from support import json_schemas  # not in the process of the commands

        json_schemas.validate(typed, said[0])
    return subprocess.CompletedProcess(typed, status, *said)


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(_AT_START)}


def write_program(folder: Path) -> None:
    """Write a program ``virt-sse``, which shell scripts run like the installed one, into *folder*."""
    program = folder / PROGRAM.name
    values = (str(PROGRAM), _AT_START, _at_start(os.environ), start())
    program.write_text(f"#!{sys.executable} -IS\n{_PROGRAM.format(*map(repr, values))}")
    program.chmod(0o755)


_PROGRAM = """\
import json, os, socket, sys
if {{n: v for n, v in os.environ.items() if n.startswith({1})}} != {2}:
    os.execv({0}, [{0}, *sys.argv[1:]])
request = dict(arguments=sys.argv[1:], environment=dict(os.environ), folder=os.getcwd())
connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
connection.connect({3})
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
sys.exit(int(connection.recv(64)) % 256)
"""


def start(inside: Sequence[str] = ()) -> str:
    """Start the server unless it runs: its address, an abstract socket. It ends with this process."""
    with _STARTING:
        return _started(tuple(inside))


def servers() -> set[int]:
    """The process IDs of the servers in other namespaces."""
    found = set()
    for process in _IN_NAMESPACES:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text("ascii")
            found |= {process.pid, *map(int, children.split())}
    return found


@cache
def _started(inside: tuple[str, ...]) -> str:
    address = f"\0virt-sse-tests-{os.getpid()}-{len(_IN_NAMESPACES) if inside else ''}"
    ends, _ = os.pipe()  # the other end stays open as long as this process runs
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(64)
        process = subprocess.Popen(
            [*inside, sys.executable, __file__, str(listener.fileno()), str(ends)],
            pass_fds=[listener.fileno(), ends],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    os.close(ends)
    if inside:
        _IN_NAMESPACES.append(process)
    atexit.register(process.wait)
    atexit.register(process.kill)  # called first
    return address


def _serve(listener: socket.socket, life: int) -> None:
    """Fork a process for each connection. Returns in the process of a command, ready to run it.

    :param life: a pipe that the test process holds open for writing.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        readable, _, _ = select.select([listener, life], [], [])
        if life in readable:
            sys.exit()
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            os.close(life)
            content, descriptors, _, _ = socket.recv_fds(connection, _LONGEST, 3)
            pid = os.fork()
            if pid:
                for descriptor in descriptors:
                    os.close(descriptor)
                _report(connection, pid)
            connection.close()
            _become(json.loads(content), descriptors)
            return
        connection.close()


def _report(connection: socket.socket, pid: int) -> NoReturn:
    """Tell the test the command's exit status; kill the command if the test no longer waits."""
    ended = os.pidfd_open(pid)
    readable, _, _ = select.select([ended, connection], [], [])
    if ended not in readable:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # the test no longer waits
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(request: dict[str, object], descriptors: list[int]) -> None:
    """Take over streams, environment, folder and arguments of a command."""
    for stream, descriptor in enumerate(descriptors):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115 -- the present streams may be of another type
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])  # type: ignore[call-overload]
    os.chdir(str(request["folder"]))
    sys.argv[:] = [str(PROGRAM), *request["arguments"]]  # type: ignore[misc]


def _main() -> None:
    import importlib

    listener, life = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    sys.path.pop(0)  # the folder of this file
    for module in _LOADED:
        importlib.import_module(module)
    from virt_sse.cli import main

    for noun in main._NOUNS:
        importlib.import_module(f"virt_sse.cli.{noun}")
    gc.freeze()
    _serve(listener, life)
    _end(_status_of(main.main))


def _status_of(command: Callable[[], None]) -> int:
    try:
        command()
    except SystemExit as exc:
        if isinstance(exc.code, int):
            return exc.code
        raise
    return 0


def _end(status: int) -> NoReturn:
    """Exit without the interpreter's clean-up, which would copy all memory shared with the server."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


if __name__ == "__main__":
    _main()

"""The agent of a lab host."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from virt_sse.agent_client import SOCKET, ask
from virt_sse.errors import AgentUnavailableError, LabError
from virt_sse.lab import leashed
from virt_sse.lab.host import LabHost
from virt_sse.lab.requirements import SYSTEM_PATH

_START_SECONDS = 30.0
_STOP_SECONDS = 30.0
_ANSWER_SECONDS = 10.0


class LabAgent:
    """The real agent of a lab host, in a separate process; ends together with the process which started it.

    The agent runs inside the host's namespaces, like the hooks: agent and hooks can end each other's
    processes, and all end with the host.

    :param within: a command that executes the agent, e.g. in a sandbox; the agent's own is appended.
    """

    def __init__(self, host: LabHost, *, within: Sequence[str | Path] = ()) -> None:
        self._host = host
        self._within = within
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self.stop()

    @property
    def socket(self) -> Path:
        """Path of the agent's socket."""
        return self._host.root / SOCKET

    @property
    def log_path(self) -> Path:
        """Log of all starts of the agent, one JSON object per line."""
        return self._host.directory / "agent.log"

    @property
    def pid(self) -> int:
        """The agent's process ID, in the caller's PID namespace.

        :raise LabError: When the agent is not running.
        """
        return self._inside()[0]

    @property
    def own_pid(self) -> int:
        """The agent's process ID, in the lab host's PID namespace.

        :raise LabError: When the agent is not running.
        """
        return self._inside()[1]

    def start(self) -> None:
        """Start the agent, and wait until the agent answers.

        :raise LabError: When the agent does not start; a note contains its output.
        """
        if self._process is not None:
            raise LabError("the lab agent is already running")
        self._process = leashed.start(
            ["agent", "run"],
            self.log_path,
            command=lambda own: self._host.command([*self._within, *own]),
            environment=self._host.environment
            | {"PATH": f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"},
        )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                if self.status()["pid"] == self.own_pid:
                    return
            except (AgentUnavailableError, LabError):
                pass
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._give_up()
                error = LabError("the lab agent does not start")
                error.add_note(self.log_path.read_text()[-2000:])
                raise error
            time.sleep(0.05)

    def stop(self) -> int:
        """End the agent with SIGTERM, as a service manager does. Returns the exit status."""
        return self._end(signal.SIGTERM)

    def kill(self) -> int:
        """Kill the agent, with the effect of a power failure. Returns the exit status."""
        return self._end(signal.SIGKILL)

    def suspend(self) -> None:
        """Make the agent hang: requests get no answer."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after :meth:`suspend`."""
        os.kill(self.pid, signal.SIGCONT)
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)  # nsenter(1) stops together with its child

    def status(self) -> dict[str, object]:
        """The agent's ``/status`` document.

        :raise AgentUnavailableError: When the agent does not answer.
        """
        document: dict[str, object] = json.loads(ask(self.socket, "GET", "/status", timeout=_ANSWER_SECONDS))
        return document

    def metrics(self) -> dict[str, float]:
        """The agent's metrics, by name and labels in Prometheus's notation.

        :raise AgentUnavailableError: When the agent does not answer.
        """
        text = ask(self.socket, "GET", "/metrics", timeout=_ANSWER_SECONDS).decode()
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def events(self, name: str, **values: object) -> list[dict[str, object]]:
        """The log's events with this name and these values."""
        return [event for event in self.log() if event["event"] == name and values.items() <= event.items()]

    def log(self) -> list[dict[str, object]]:
        """All events in the agent's log; an incomplete last line is left out."""
        complete, _, _ = self.log_path.read_text().rpartition("\n")
        return [json.loads(line) for line in complete.splitlines() if line.startswith("{")]

    def wait(self) -> int:
        """Wait until the agent has ended. Returns the exit status.

        :raise LabError: When the agent does not end.
        """
        process = self._process
        if process is None:
            raise LabError("the lab agent is not running")
        try:
            status = process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.kill(self.pid, signal.SIGUSR1)  # makes the agent print its threads' stacks
            time.sleep(0.5)
            self._give_up()
            error = LabError("the lab agent does not end")
            error.add_note(self.log_path.read_text()[-8000:])
            raise error from None
        self._process = None
        return status

    def _inside(self) -> tuple[int, int]:
        """The agent's process IDs, in the caller's and in the lab host's PID namespace.

        :raise LabError: When the agent is not running.
        """
        if self._process is not None:
            nsenter = self._process.pid
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                for child in Path(f"/proc/{nsenter}/task/{nsenter}/children").read_text().split():
                    status = Path(f"/proc/{child}/status").read_text()
                    (line,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
                    return int(child), int(line.split()[-1])
        raise LabError("the lab agent is not running")

    def _give_up(self) -> None:
        """Kill the agent and the nsenter(1) waiting for the agent."""
        with contextlib.suppress(LabError, ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _end(self, number: signal.Signals) -> int:
        os.kill(self.pid, number)
        return self.wait()

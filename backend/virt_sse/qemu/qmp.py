"""QMP: commands to a QEMU process's monitor (QEMU ``docs/interop/qmp-spec.txt``), with qemu.qmp."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError

from virt_sse.errors import MonitorError

_TIMEOUT = 20.0
"""Seconds in which a monitor answers unless its process hangs."""

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what it would log is raised


class MonitorSilentError(MonitorError):
    """No QEMU process answers at the monitor's socket, or the process ends before its greeting."""


class Monitor:
    """A connected monitor."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """What the process answers to *command*.

        :raise MonitorError: When it refuses, ends, or does not answer. Says nothing of *arguments*.
        """
        try:
            return await asyncio.wait_for(
                self._client.execute(command, dict(arguments) if arguments else None), _TIMEOUT
            )
        except ExecuteError as exc:
            raise MonitorError(
                f"{command}: {exc.error.error.desc}"
            ) from None  # the error holds the arguments
        except TimeoutError as exc:
            raise MonitorError(f"no answer to {command} within {_TIMEOUT:g} s") from exc
        except (ExecInterruptedError, QMPError, OSError, EOFError):
            raise MonitorError(f"the process ended during {command}") from None


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Monitor]:
    """A connection to the monitor that listens at *path*.

    :raise MonitorSilentError: When no process answers at *path*.
    """
    client = QMPClient()
    try:
        await asyncio.wait_for(client.connect(str(path)), _TIMEOUT)
    except (ConnectError, OSError, TimeoutError) as exc:
        reason = str(exc) or f"nothing said within {_TIMEOUT:g} s"
        raise MonitorSilentError(f"its monitor does not answer: {reason}") from exc
    try:
        yield Monitor(client)
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError):
            await client.disconnect()

"""QMP: commands to a QEMU process's monitor (QEMU ``docs/interop/qmp-spec.txt``), with qemu.qmp."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from qemu.qmp import ConnectError, ExecInterruptedError, ExecuteError, QMPClient, QMPError

from virt_sse.errors import MonitorError, MonitorSilentError

_TIMEOUT = 20.0
"""Seconds until a monitor's process counts as hung."""

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # its log messages are also raised as exceptions


class Monitor:
    """A connection to a QEMU process's monitor."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Execute *command* and return its result.

        :raise MonitorError: When the process refuses the command, ends, or does not answer. The message does
            not include *arguments*, which may be secret.
        """
        try:
            return await asyncio.wait_for(
                self._client.execute(command, dict(arguments) if arguments else None), _TIMEOUT
            )
        except ExecuteError as exc:
            raise MonitorError(
                f"{command}: {exc.error.error.desc}"
            ) from None  # the original error includes the arguments
        except TimeoutError as exc:
            raise MonitorError(f"no answer to {command} within {_TIMEOUT:g} s") from exc
        except (ExecInterruptedError, QMPError, OSError, EOFError):
            raise MonitorError(f"the process ended during {command}") from None


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Monitor]:
    """Connect to the monitor listening at *path*.

    :raise MonitorSilentError: When no monitor answers at *path*.
    """
    client = QMPClient()
    try:
        await asyncio.wait_for(client.connect(str(path)), _TIMEOUT)
    except (ConnectError, OSError, TimeoutError) as exc:
        reason = str(exc) or f"no greeting within {_TIMEOUT:g} s"
        raise MonitorSilentError(f"the monitor does not answer: {reason}") from exc
    try:
        yield Monitor(client)
    finally:
        with contextlib.suppress(QMPError, OSError, EOFError):  # includes TimeoutError
            await asyncio.wait_for(client.disconnect(), _TIMEOUT)

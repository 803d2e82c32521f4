"""A throw-away key vault."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, cast

from virt_sse.errors import ConfigError, LabError, LabUnavailableError
from virt_sse.lab import directories, leashed

if TYPE_CHECKING:
    from virt_sse.lab.tokens import LabToken

_STOP_TIMEOUT = 20.0
_HOST = "127.0.0.1"
_PORTS = (15000, 32000)


class LabVault:
    """A key vault of one's own, served on a loopback port from a folder of its own by a process of its own.

    When the process that started it ends, also by ``kill -9``, the vault ends with it; the folder goes with
    :meth:`remove`, or with the next lab's start after a kill.

    :param arguments: what ``virt-sse vault serve`` is given besides.
    :param premium: whether it has RSA-HSM keys too, in
    :param token: this token, or a SoftHSM one of its own.
    :param retention_days: how long a deleted key can be recovered.
    """

    def __init__(
        self,
        *,
        arguments: Sequence[str] = (),
        premium: bool = False,
        token: LabToken | None = None,
        retention_days: int = 90,
        purge_protection: bool = False,
        base: Path = Path("/tmp"),  # noqa: S108 -- a folder of its own below
    ) -> None:
        self._arguments = list(arguments)
        self._premium = premium
        self._token = token
        self._retention_days = retention_days
        self._purge_protection = purge_protection
        self._base = base
        self._folder: directories.LabDirectory | None = None
        self._process: subprocess.Popen[str] | None = None
        self._port = 0

    def __repr__(self) -> str:
        return f"LabVault({self._port}, {'running' if self._process else 'stopped'})"

    def __enter__(self) -> Self:
        self.initialise()
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.remove()

    @property
    def directory(self) -> Path:
        """The vault's folder.

        :raise LabError: When the vault is not there yet, or gone.
        """
        if self._folder is None:
            raise LabError("the lab vault has not been made")
        return self._folder.path / "vault"

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"https://{_HOST}:{self._port}"

    @property
    def ca_path(self) -> Path:
        """The certificate that its clients trust."""
        return self.directory / "ca.pem"

    @property
    def administrator_path(self) -> Path:
        """The credential file of an administrator, who may not use keys unless granted."""
        return self.directory / "administrator.json"

    @property
    def log_path(self) -> Path:
        """What the server has said."""
        return self.directory.parent / "log"

    @property
    def pid(self) -> int:
        """The server's process.

        :raise LabError: When it does not run.
        """
        if self._process is None:
            raise LabError("the lab vault does not run")
        return self._process.pid

    def initialise(self) -> None:
        """Sweep what killed runs left, then make the vault, without serving it yet.

        :raise LabUnavailableError: When SoftHSM or PyKCS11 is not installed, for a token of its own.
        """
        from virt_sse.vault.home.settings import Tier
        from virt_sse.vault.initialise import initialise

        directories.sweep(self._base)
        self._folder = directories.create(self._base)
        self._port = _free_port()
        try:
            initialise(
                self.directory,
                tier=Tier.PREMIUM if self._premium else Tier.STANDARD,
                hsm={} if self._token is None else {k: str(v) for k, v in self._token.options.items()},
                name="lab-vault",
                hosts=(_HOST, "localhost"),
                port=self._port,
                retention_days=self._retention_days,
                purge_protection=self._purge_protection,
            )
        except ConfigError as exc:
            self.remove()
            raise LabUnavailableError(f"no premium vault: {exc}", hint=exc.hint) from exc

    def start(self) -> None:
        """Serve it; done when it answers.

        :raise LabError: When it does not start; a note carries what it said.
        """
        if self._process is not None:
            raise LabError("the lab vault runs already")
        self._process = leashed.start(
            ["vault", "serve", "--directory", str(self.directory), *self._arguments],
            self.log_path,
            output=subprocess.PIPE,
        )
        output = cast("IO[str]", self._process.stdout)
        if not output.readline():
            self.kill()
            error = LabError("the lab vault does not start")
            error.add_note(self.log_path.read_text()[-2000:])
            raise error

    def stop(self) -> None:
        """End the server, as a service manager would, and wait for it. Nothing when it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a power cut would."""
        self._end(signal.SIGKILL)

    def remove(self) -> None:
        """Remove the vault with all keys in it."""
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.remove()

    def _end(self, number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.communicate(timeout=_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _free_port() -> int:
    """A port that nobody listens on, from below those that the kernel gives to clients: it must stay free."""
    while True:
        port = random.randrange(*_PORTS)  # noqa: S311 -- no secret
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind((_HOST, port))
            return port

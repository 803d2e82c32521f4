"""A throw-away key vault."""

from __future__ import annotations

import contextlib
import random
import select
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Self, cast

from virt_sse.errors import ConfigError, LabError, LabUnavailableError
from virt_sse.lab import leashed
from virt_sse.lab.directories import OwnedDirectory
from virt_sse.system.extras import require as require_extra

if TYPE_CHECKING:
    from virt_sse.lab.tokens import LabToken

_START_TIMEOUT = 120.0
_STOP_TIMEOUT = 20.0
_HOST = "127.0.0.1"
_PORTS = (15000, 32000)


class LabVault:
    """A private key vault, served on a loopback port by a separate process, from a private folder.

    The vault ends together with the process which started the vault, even after ``kill -9``. The folder is
    removed by :meth:`remove`, or after a kill by the next start of a lab.

    :param arguments: further arguments of ``virt-sse vault serve``.
    :param premium: whether the vault also has RSA-HSM keys.
    :param token: token for RSA-HSM keys; by default, a SoftHSM token private to this vault.
    :param retention_days: number of days a deleted key can be recovered.
    :param audience: parent domain, for Azure's stock clients. Then the vault's URL has the name
        ``lab.AUDIENCE``, which the caller has to resolve to the loopback address.
    :param database: URL of an empty database in PostgreSQL; by default, SQLite in the folder.
    :param instance_of: a vault in PostgreSQL: this is a further instance, with a folder and a port of its
        own. The parameters of the vault itself are then those of *instance_of*.
    """

    def __init__(
        self,
        *,
        arguments: Sequence[str] = (),
        premium: bool = False,
        token: LabToken | None = None,
        retention_days: int = 90,
        purge_protection: bool = False,
        audience: str | None = None,
        database: str | None = None,
        instance_of: LabVault | None = None,
        base: Path = Path("/tmp"),  # noqa: S108 -- uses a private folder below
    ) -> None:
        self._arguments = list(arguments)
        self._premium = premium
        self._token = token
        self._retention_days = retention_days
        self._purge_protection = purge_protection
        self._audience = audience
        self._database = database
        self._instance_of = instance_of
        self._folder = OwnedDirectory(base, "the lab vault")
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

        :raise LabError: When the vault has not been made, or was removed.
        """
        return self._folder.path / "vault"

    @property
    def url(self) -> str:
        """URL of the vault, or of this further instance."""
        return f"https://{_HOST}:{self._port}"

    @property
    def ca_path(self) -> Path:
        """Certificate to be trusted by clients."""
        return self.directory / "ca.pem"

    @property
    def administrator_path(self) -> Path:
        """Credential file of an administrator; using keys requires a further grant."""
        return (self._instance_of or self).directory / "administrator.json"

    @property
    def log_path(self) -> Path:
        """File with the server's output."""
        return self.directory.parent / "log"

    @property
    def pid(self) -> int:
        """The server's process ID.

        :raise LabError: When the server is not running.
        """
        if self._process is None:
            raise LabError("the lab vault is not running")
        return self._process.pid

    def initialise(self) -> None:
        """Remove remains of killed runs, then make the vault, without serving it yet.

        :raise LabUnavailableError: When an extra is not installed, or SoftHSM, if needed for a private token.
        """
        try:
            require_extra("vault", "the lab vault")
        except ConfigError as exc:
            raise LabUnavailableError(str(exc), hint=exc.hint) from exc
        from virt_sse.vault.home.settings import Tier
        from virt_sse.vault.initialise import initialise

        self._folder.make()
        self._port = free_port()
        if self._instance_of is not None:
            self._import_root(self._instance_of)
            return
        try:
            initialise(
                self.directory,
                tier=Tier.PREMIUM if self._premium else Tier.STANDARD,
                hsm={} if self._token is None else {k: str(v) for k, v in self._token.options.items()},
                name="lab-vault",
                hosts=(*([f"lab.{self._audience}"] if self._audience else []), _HOST, "localhost"),
                port=self._port,
                audience=self._audience,
                retention_days=self._retention_days,
                purge_protection=self._purge_protection,
                database=self._database,
            )
        except ConfigError as exc:
            self.remove()
            raise LabUnavailableError(f"no premium vault: {exc}", hint=exc.hint) from exc

    def start(self) -> None:
        """Start the server, and wait until the vault answers.

        :raise LabError: When the server does not start; a note contains its output.
        """
        if self._process is not None:
            raise LabError("the lab vault is already running")
        self._process = leashed.start(
            [
                "vault",
                "serve",
                "--directory",
                str(self.directory),
                "--port",
                str(self._port),
                *self._arguments,
            ],
            self.log_path,
            output=subprocess.PIPE,
        )
        output = cast("IO[str]", self._process.stdout)
        poll = select.poll()
        poll.register(output, select.POLLIN)
        if not (poll.poll(_START_TIMEOUT * 1000) and output.readline()):
            self.kill()
            error = LabError(f"the lab vault does not start, or does not answer within {_START_TIMEOUT:g} s")
            error.add_note(self.log_path.read_text()[-2000:])
            raise error

    def stop(self) -> None:
        """End the server with SIGTERM and wait for its end. Does nothing when the server is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the server, with the effect of a power failure."""
        self._end(signal.SIGKILL)

    def remove(self) -> None:
        """Remove the vault with all its keys."""
        self._folder.remove()

    def _import_root(self, other: LabVault) -> None:
        from virt_sse.vault.home.layout import VaultDirectory
        from virt_sse.vault.root_export import Recipient, export_root, import_root

        file, recipient = self.directory.parent / "root", Recipient.new_key_pair()
        export_root(VaultDirectory(other.directory), file, recipient)
        import_root(file, self.directory, recipient)
        file.unlink()

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


def free_port() -> int:
    """A free port outside the kernel's range for clients, so that the port stays free."""
    while True:
        port = random.randrange(*_PORTS)  # noqa: S311 -- no secret
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind((_HOST, port))
            return port

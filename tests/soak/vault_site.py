"""A served vault, with the state of its keys and principals as a client sees them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from azure.core.exceptions import HttpResponseError, ResourceNotFoundError
from azure.keyvault.keys import KeyClient
from azure.keyvault.keys.crypto import CryptographyClient, KeyWrapAlgorithm
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from soak.kill_points import run
from support.command_line import PROGRAM
from support.leftovers import Leftovers
from support.vault_tools import key_client, new_name, sdk_options
from support.waiting import is_gone, wait_until
from virt_sse.audit.log import AuditLog
from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.permissions import USE

DEK = bytes(range(32))
_OAEP = KeyWrapAlgorithm.rsa_oaep_256
ABSENT, DELETED = "absent", "deleted"


@dataclass
class Subject:
    """What one operation works on.

    :ivar name: of a key, and of a principal.
    :ivar wrapped: the DEK wrapped by each version of the key, by the version's id.
    """

    name: str
    wrapped: dict[str, bytes] = field(default_factory=dict)


class VaultSite:
    """A vault on loopback, and its administrator."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self.folder = folder
        self.vault = stack.enter_context(LabVault())
        self.environment = os.environ | {"VIRT_SSE_VAULT_CREDENTIAL": str(self.vault.administrator_path)}
        self.pem = folder / "import.pem"
        key = rsa.generate_private_key(65537, 2048)
        self.pem.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        self.subject = Subject("none")
        self.leftovers = Leftovers()
        with self.administration() as administration:
            administration.grant("administrator", USE)

    @contextlib.contextmanager
    def client(self) -> Iterator[KeyClient]:
        """A client without connections of an earlier server."""
        with VaultCredential(self.vault.administrator_path) as credential, key_client(credential) as client:
            yield client

    def administration(self) -> VaultClient:
        return VaultClient(self.vault.administrator_path)

    def cli(self, *arguments: str) -> None:
        ended = run([PROGRAM, *arguments], environment=self.environment)
        assert ended.status == 0, f"{arguments}: {ended}"

    def new_subject(self) -> None:
        self.subject = Subject(new_name("soak"))

    def new_key(self) -> None:
        """A key with two versions, which both have wrapped the DEK."""
        self.new_subject()
        with self.client() as client:
            for _ in range(2):
                client.create_rsa_key(self.subject.name, size=2048)
        self.wrap()

    def new_principal(self) -> None:
        self.new_subject()
        with self.administration() as administration:
            administration.new_credential_file(self.folder / f"{self.subject.name}.json", self.subject.name)

    def wrap(self) -> None:
        """Wrap the DEK with each version of the key."""
        with VaultCredential(self.vault.administrator_path) as credential:
            for url in self.versions():
                with CryptographyClient(url, credential, **sdk_options(credential)) as crypto:
                    self.subject.wrapped[url] = crypto.wrap_key(_OAEP, DEK).encrypted_key

    def versions(self) -> dict[str, bool]:
        """The versions of the key, by id: whether the version is enabled. Empty without a key."""
        with self.client() as client:
            try:
                found = list(client.list_properties_of_key_versions(self.subject.name))
            except ResourceNotFoundError:
                return {}
        return {str(version.id): bool(version.enabled) for version in found}

    def state(self) -> str:
        """State of the key: absent, deleted, or ``+`` for each enabled version and ``-`` for each other."""
        with self.client() as client, contextlib.suppress(ResourceNotFoundError):
            client.get_deleted_key(self.subject.name)
            return DELETED
        return "".join(sorted("-+"[enabled] for enabled in self.versions().values())) or ABSENT

    def permissions(self) -> str:
        with self.administration() as administration:
            found = administration.permissions(self.subject.name)
        return " ".join(sorted(permission.value for permission in found))

    def check_wrapped(self) -> None:
        """Check that versions unwrap what they wrapped if enabled, and refuse otherwise."""
        versions = self.versions()
        with VaultCredential(self.vault.administrator_path) as credential:
            for url, wrapped in self.subject.wrapped.items():
                with CryptographyClient(url, credential, **sdk_options(credential)) as crypto:
                    if versions.get(url):
                        assert crypto.unwrap_key(_OAEP, wrapped).key == DEK
                    else:
                        with pytest.raises(HttpResponseError) as caught:
                            crypto.unwrap_key(_OAEP, wrapped)
                        assert caught.value.status_code in (403, 404)

    def bring_back(self) -> None:
        """Recover a deleted key, and enable all its versions: the key then opens all that was wrapped."""
        if self.state() == DELETED:
            with self.client() as client:
                client.begin_recover_deleted_key(self.subject.name).wait()
        with self.client() as client:
            for url in self.versions():
                client.update_key_properties(self.subject.name, url.rsplit("/", 1)[1], enabled=True)
        self.check_wrapped()

    def runs(self) -> bool:
        """Whether the server runs; a zombie does not."""
        return not is_gone(self.vault.pid)

    def restart(self) -> None:
        """Reap the killed server, and start the next."""
        self.vault.kill()
        wait_until(lambda: not self.processes(), f"no process is left: {self.processes()}")
        self.vault.start()

    def check_home(self) -> None:
        """Check database, audit log and processes of the vault."""
        assert self.processes() == [self.vault.pid]
        self.leftovers.check(beside=[self.vault.pid], seconds=60)
        database = self.vault.directory / "vault.sqlite"
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert self.audit().verify().broken is None

    def audit(self) -> AuditLog:
        return AuditLog(self.vault.directory / "audit.jsonl")

    def processes(self) -> list[int]:
        """Processes of the vault's server."""
        found = []
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    words = (folder / "cmdline").read_bytes().split(b"\0")
                    if str(self.vault.directory).encode() in words and b"serve" in words:
                        found.append(int(folder.name))
        return found

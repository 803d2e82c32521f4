"""Keys in a lab vault as their administrator handles them, and identities that use them."""

from __future__ import annotations

import itertools
import uuid
from pathlib import Path
from types import TracebackType
from typing import Self

from azure.keyvault.keys import KeyClient
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from virt_sse.lab.vaults import LabVault
from virt_sse.model.keys import KeyId, ProviderConfig
from virt_sse.vault_client.administration import VaultClient
from virt_sse.vault_client.credential import VaultCredential
from virt_sse.vault_client.credential_file import CredentialFile
from virt_sse.vault_client.permissions import Permission
from virt_sse_plugins.key_providers.customer_managed import CustomerManagedKeyProvider
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey

RIGHTS = (Permission.GET, Permission.WRAP_KEY, Permission.UNWRAP_KEY)
"""The least permissions for the use of keys."""


class CustomerKeys:
    """The administrator of *vault*.

    :param folder: where credential files go; made when needed.
    """

    def __init__(self, vault: LabVault, folder: Path) -> None:
        self._vault = vault
        self._folder = folder
        self._numbers = itertools.count(1)
        self._providers: list[CustomerManagedKeyProvider] = []
        self.administration = VaultClient(vault.administrator_path)
        self._credential = VaultCredential(vault.administrator_path)
        self.client = KeyClient(
            vault.url,
            self._credential,
            connection_verify=self._credential.ca_file(),
            verify_challenge_resource=False,
            use_env_settings=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for provider in self._providers:
            provider.close()
        self.client.close()
        self.administration.close()
        self._credential.close()

    def new_key(self, *, size: int = 2048, in_hsm: bool = False) -> str:
        """Make a key; its URL."""
        name = f"test-{uuid.uuid4()}"
        self.client.create_rsa_key(name, size=size, hardware_protected=in_hsm)
        return f"{self._vault.url}/keys/{name}"

    def new_identity(self, *permissions: Permission) -> Path:
        """Make an identity with *permissions*: its credential file."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._folder / f"identity-{next(self._numbers)}.json"
        file = self.administration.new_credential_file(path, f"test-{uuid.uuid4()}")
        self.administration.grant(file.client_id, permissions)
        return path

    def open_provider(self, identity: Path | None = None, **options: object) -> CustomerManagedKeyProvider:
        """The provider under test, acting as *identity*; closed when this is."""
        config = ProviderConfig(self._folder, options, identity)
        self._providers.append(CustomerManagedKeyProvider.from_config(config))
        return self._providers[-1]

    def rotate(self, url: str) -> None:
        self.client.rotate_key(_name(url))

    def enable(self, key: KeyId, *, enabled: bool) -> None:
        self.client.update_key_properties(_name(key.name), key.version, enabled=enabled)

    def delete(self, url: str) -> None:
        self.client.begin_delete_key(_name(url)).wait()

    def recover(self, url: str) -> None:
        self.client.begin_recover_deleted_key(_name(url)).wait()

    def purge(self, url: str) -> None:
        self.client.purge_deleted_key(_name(url))

    @staticmethod
    def client_id(identity: Path) -> str:
        return CredentialFile.read(identity).client_id

    @staticmethod
    def private_key_of(identity: Path) -> bytes:
        """The private key that signs the identity's assertions, in DER."""
        key = load_pem_private_key(CredentialFile.read(identity).private_key.encode(), None)
        return key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def _name(url: str) -> str:
    return KeyVaultKey.parse(url).name

"""Clients and requests for tests of a running vault."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from azure.keyvault.keys import KeyClient

from virt_sse.lab.vaults import LabVault
from virt_sse.vault_client.credential import VaultCredential

OAEP = "RSA-OAEP-256"
_AZURES = ("/keys", "/deletedkeys", "/rng")
"""Paths of Azure Key Vault's operations, which need an ``api-version``."""


def new_name(prefix: str = "key") -> str:
    """A name unique to the test."""
    return f"{prefix}-{uuid4().hex[:12]}"


def sdk_options(credential: VaultCredential) -> dict[str, Any]:
    """Options for the SDK's clients to reach a vault outside of Azure's domain."""
    return {
        "connection_verify": credential.ca_file(),
        "verify_challenge_resource": False,
        "use_env_settings": False,
        "retry_total": 0,
        "connection_timeout": 5,
        "read_timeout": 10,
    }


@contextmanager
def key_client(credential: VaultCredential) -> Iterator[KeyClient]:
    """The SDK's client."""
    with KeyClient(credential.file.vault_url, credential, **sdk_options(credential)) as client:
        yield client


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def code(self) -> str:
        """The error's most exact code."""
        error = self.body["error"]
        return str(error.get("innererror", error)["code"])


class Raw:
    """HTTPS requests of any form, valid or not, over a kept-alive connection."""

    def __init__(self, vault: LabVault, token: str | None) -> None:
        host = vault.url.removeprefix("https://")
        self.connection = http.client.HTTPSConnection(
            host, timeout=30, context=ssl.create_default_context(cafile=vault.ca_path)
        )
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def __call__(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: Mapping[str, str] | None = None,
        *,
        api_version: str | None = "7.6",
    ) -> Answer:
        if api_version and path.startswith(_AZURES):
            path += f"{'&' if '?' in path else '?'}api-version={api_version}"
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        self.connection.request(method, path, content, self._headers | dict(headers or {}))
        answer = self.connection.getresponse()
        text = answer.read()
        named = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, named, json.loads(text) if text else None)

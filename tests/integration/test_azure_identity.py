"""The customer-managed provider as an identity that Azure gives a host, at a real key vault."""

from __future__ import annotations

import http.server
import json
import os
import secrets
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from support.customer_keys import RIGHTS, CustomerKeys
from virt_sse.errors import KeyDeniedError, KeyProviderUnavailableError
from virt_sse.lab.vaults import LabVault
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyState, WrappedDek
from virt_sse.vault.home.certificates import new_authority
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault_client.credential import VaultCredential

CONTEXT = DekContext(uuid.uuid4(), "service")


@pytest.fixture
def keys(lab_vault: LabVault, tmp_path: Path) -> Iterator[CustomerKeys]:
    with CustomerKeys(lab_vault, tmp_path / "identities") as keys:
        yield keys


class IdentityEndpoint(http.server.ThreadingHTTPServer):
    """What a host has that Azure gave a managed identity: the principal of a credential file.

    :ivar resources: what tokens were asked for.
    """

    daemon_threads = True

    def __init__(self, identity: Path) -> None:
        self.secret = secrets.token_hex(16)
        self.resources: list[str] = []
        self.status = 200
        self.credential = VaultCredential(identity)
        super().__init__(("127.0.0.1", 0), _IdentityHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/msi/token"


class _IdentityHandler(http.server.BaseHTTPRequestHandler):
    server: IdentityEndpoint

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        (resource,) = query["resource"]
        self.server.resources.append(resource)
        if self.headers["X-IDENTITY-HEADER"] != self.server.secret or self.server.status != 200:
            self.send_error(self.server.status if self.server.status != 200 else 403)
            return
        token, expires = self.server.credential.get_token(f"{resource}/.default")
        body = json.dumps(
            {"access_token": token, "expires_on": str(expires), "resource": resource, "token_type": "Bearer"}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 -- the base class's name
        """Nobody reads it."""


@pytest.fixture
def endpoint(keys: CustomerKeys, monkeypatch: pytest.MonkeyPatch) -> Iterator[IdentityEndpoint]:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "MSI_", "IDENTITY_"))]:
        monkeypatch.delenv(name)
    with IdentityEndpoint(keys.new_identity(*RIGHTS)) as endpoint:
        threading.Thread(target=endpoint.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("IDENTITY_ENDPOINT", endpoint.url)
        monkeypatch.setenv("IDENTITY_HEADER", endpoint.secret)
        yield endpoint
        endpoint.shutdown()
        endpoint.credential.close()


def of_azure(vault: LabVault, credential: str) -> dict[str, object]:
    host = vault.url.removeprefix("https://")
    return {"credential": credential, "ca": str(vault.ca_path), "hosts": [host]}


@pytest.mark.parametrize("credential", ["managed-identity", "default"])
def test_an_identity_managed_by_azure_uses_keys(
    keys: CustomerKeys, lab_vault: LabVault, endpoint: IdentityEndpoint, credential: str
) -> None:
    provider = keys.open_provider(**of_azure(lab_vault, credential))
    key = provider.current_key(keys.new_key())
    dek = Dek.generate()
    wrapped = provider.wrap(dek, key, context=CONTEXT)
    assert provider.unwrap(wrapped, context=CONTEXT) == dek
    assert endpoint.resources == [lab_vault.url]

    keys.enable(key, enabled=False)
    assert provider.key_state(key) is KeyState.DISABLED
    keys.enable(key, enabled=True)
    keys.administration.change_principal(endpoint.credential.file.client_id, enabled=False, expires=None)
    assert provider.key_state(key) is KeyState.DENIED
    with pytest.raises(KeyDeniedError, match=r"refused the unwrap \(401 Unauthorized\)") as caught:
        provider.unwrap(wrapped, context=CONTEXT)
    assert "this host's" in str(caught.value.hint)


def test_a_missing_managed_identity_is_no_verdict(
    keys: CustomerKeys, lab_vault: LabVault, endpoint: IdentityEndpoint
) -> None:
    key = KeyId("customer-managed", keys.new_key(), "0" * 32)
    wrapped = WrappedDek(bytes(256), "RSA-OAEP-256", key)
    for status in (403, 500):
        endpoint.status = status
        provider = keys.open_provider(**of_azure(lab_vault, "managed-identity"))
        assert provider.key_state(key) is KeyState.UNREACHABLE
        with pytest.raises(KeyProviderUnavailableError, match="no token for the key vault: "):
            provider.unwrap(wrapped, context=CONTEXT)


@pytest.mark.usefixtures("endpoint")
def test_a_managed_identity_that_does_not_trust_the_vault_is_refused(
    keys: CustomerKeys, lab_vault: LabVault, tmp_path: Path
) -> None:
    (tmp_path / "ca.pem").write_bytes(new_authority("other")[0])
    options = of_azure(lab_vault, "managed-identity") | {"ca": str(tmp_path / "ca.pem")}
    provider = keys.open_provider(**options)
    name = keys.new_key()
    with pytest.raises(KeyProviderUnavailableError, match="its certificate is not trusted"):
        provider.current_key(name)


@pytest.mark.slow
def test_a_token_is_requested_for_the_vault_alone(keys: CustomerKeys, endpoint: IdentityEndpoint) -> None:
    with LabVault() as vault:
        vault.stop()
        path = VaultDirectory(vault.directory).settings_path
        content = path.read_text("utf-8")
        path.write_text(content.replace(f'"audience": "{vault.url}"', '"audience": "https://other.example"'))
        assert path.read_text("utf-8") != content
        vault.start()
        provider = keys.open_provider(**of_azure(vault, "managed-identity"))
        with pytest.raises(KeyProviderUnavailableError, match="requests a token for a different resource"):
            provider.current_key(f"{vault.url}/keys/web")
    assert endpoint.resources == []


def test_a_vault_removed_from_the_configuration_gets_no_token(
    keys: CustomerKeys, lab_vault: LabVault, endpoint: IdentityEndpoint
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"https://127.0.0.1:{listening.getsockname()[1]}"
        provider = keys.open_provider(**of_azure(lab_vault, "managed-identity"))
        with pytest.raises(KeyDeniedError, match=f"managed identity is not meant for the key vault {url}"):
            provider.current_key(f"{url}/keys/web")
        listening.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listening.accept()
    assert endpoint.resources == []

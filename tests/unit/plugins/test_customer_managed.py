"""The customer-managed provider's options, and the places where it has no key vault."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support.customer_managed_uses import CONTEXT, SHORT, VERSION, Open, bundle, key_at, uses, wrapped_at
from support.strange_vaults import Answer, Listener, StrangeVault
from virt_sse.errors import (
    ConfigError,
    InvalidValueError,
    KeyDeniedError,
    KeyNotFoundError,
    KeyProviderUnavailableError,
)
from virt_sse.model.keys import KeyState, ProviderConfig
from virt_sse.vault.home.certificates import new_authority
from virt_sse_plugins.key_providers.customer_managed import CustomerManagedKeyProvider
from virt_sse_plugins.key_providers.key_vault_access import AzureAccess

# --- Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vault": "x"}, r"unknown option 'vault' in \[key-providers.customer-managed\]"),
        ({"credential": "certificate"}, "must be one of identity, managed-identity, default"),
        ({"credential": 1}, "must be one of identity, managed-identity, default"),
        ({"credential": ["identity"]}, "must be one of identity, managed-identity, default"),
        ({}, "needs an identity"),
        ({"ca": "/dev/null"}, "cannot read certificates from /dev/null"),
        ({"credential": "default", "ca": "/dev/null"}, "cannot read certificates from /dev/null"),
        ({"credential": "default", "ca": "/no/such"}, "/no/such: No such file or directory"),
        ({"credential": "default", "ca": 1}, "'ca' in .* must be the path"),
        ({"hosts": ["vault.example"]}, "'hosts' in .* is not allowed with the credential 'identity'"),
        ({"credential": "default", "hosts": "vault.example"}, "must be a list of HOST or HOST:PORT"),
        ({"credential": "default", "hosts": []}, "must be a list of HOST or HOST:PORT"),
        ({"credential": "default", "hosts": [1]}, "1 is neither HOST nor HOST:PORT"),
        ({"credential": "default", "hosts": ["https://vault.example"]}, "is neither HOST nor HOST:PORT"),
        ({"credential": "default", "hosts": ["vault.example/"]}, "is neither HOST nor HOST:PORT"),
        ({"credential": "default", "hosts": ["*.vault.example"]}, "is neither HOST nor HOST:PORT"),
        ({"credential": "default", "hosts": ["u@vault.example"]}, "is neither HOST nor HOST:PORT"),
        ({"addresses": ["https://vault.example"]}, "'addresses' in .* must be a table of lists of URLs"),
        ({"addresses": {"https://vault.example": []}}, "'https://vault.example' needs a list of URLs"),
        ({"addresses": {"https://vault.example": ["vault-1"]}}, r"'vault-1' is not https://HOST\[:PORT\]"),
        ({"addresses": {"vault": ["https://vault-1"]}}, r"'vault' is not https://HOST\[:PORT\]"),
        ({"credential": "default", "addresses": {}}, "'addresses' in .* needs the credential 'identity'"),
        ({"connection-timeout": "2"}, "'connection-timeout' in .* must be a number of seconds"),
        ({"connection-timeout": True}, "must be a number of seconds"),
        ({"read-timeout": float("nan")}, "must be a number of seconds"),
        ({"read-timeout": 0}, "must be more than 0 and at most 60 s"),
        ({"read-timeout": 61}, "must be more than 0 and at most 60 s"),
    ],
)
def test_invalid_options_are_refused(
    open_customer_managed: Open, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_customer_managed(**options)


def test_an_identity_is_needed_for_its_own_credential_alone(tmp_path: Path) -> None:
    for options, needed in (
        ({}, True),
        ({"credential": "identity"}, True),
        ({"credential": "default"}, False),
    ):
        assert CustomerManagedKeyProvider.needs_identity(ProviderConfig(tmp_path, options)) is needed


def test_a_key_is_named_by_its_url(customer_managed: CustomerManagedKeyProvider) -> None:
    url = "https://Vault.example:443/keys/web"
    assert customer_managed.parse_key(url) == ("https://vault.example/keys/web", None)
    assert customer_managed.parse_key(f"{url}/{VERSION}") == ("https://vault.example/keys/web", VERSION)
    with pytest.raises(InvalidValueError):
        customer_managed.parse_key("web")
    with pytest.raises(KeyNotFoundError, match="URL without a version"):
        customer_managed.current_key(f"{url}/{VERSION}")


def test_making_the_provider_reads_nothing_and_imports_no_sdk(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from virt_sse.config import Config
from virt_sse.model.keys import ProviderConfig
from virt_sse.plugins import PluginHost
assert "customer-managed" in PluginHost(Config.load(Path({str(tmp_path)!r}))).key_provider_names()
assert not [name for name in sys.modules if "customer_managed" in name or "key_vault" in name]
from virt_sse_plugins.key_providers.customer_managed import CustomerManagedKeyProvider as Provider
for options, identity in (({{}}, Path("/no/such")), ({{"credential": "default"}}, None)):
    provider = Provider.from_config(ProviderConfig(Path("/no/such"), options, identity))
    provider.close()
heavy = {{"azure.core", "azure.identity", "azure.keyvault.keys", "requests", "jwt"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_an_unreadable_credential_file_is_no_verdict(
    strange_vault: StrangeVault, open_customer_managed: Open, tmp_path: Path
) -> None:
    strange_vault.answers = [bundle(strange_vault.url)]
    whole = strange_vault.credential_file()
    path = tmp_path / "identity.json"
    provider = open_customer_managed(path, **SHORT)
    for damage, message in (
        (lambda: None, "No such file or directory"),
        (lambda: path.write_bytes(b"{}"), "open to others"),
        (lambda: path.chmod(0o600), "is no credential file"),
    ):
        damage()
        assert provider.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
        for use in uses(provider, strange_vault.url):
            with pytest.raises(KeyProviderUnavailableError, match=message):
                use()
    broken = json.loads(whole.read_bytes()) | {"private_key": "none"}
    path.write_text(json.dumps(broken))
    unsigned = open_customer_managed(path, **SHORT)
    assert unsigned.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
    assert strange_vault.seen == []
    path.write_bytes(whole.read_bytes())  # mended, it is taken up without a restart
    assert provider.key_state(key_at(strange_vault.url)) is KeyState.ENABLED


# --- Foreign hosts


@pytest.mark.parametrize("credential", ["identity", "managed-identity", "default"])
def test_a_foreign_host_gets_no_byte(
    strange_vault: StrangeVault, listener: Listener, open_customer_managed: Open, credential: str
) -> None:
    identity = strange_vault.credential_file() if credential == "identity" else None
    provider = open_customer_managed(identity, credential=credential, **SHORT)
    assert provider.key_state(key_at(listener.url)) is KeyState.UNREACHABLE
    for use in uses(provider, listener.url):
        with pytest.raises(KeyDeniedError, match=f"is not meant for the key vault {listener.url}") as caught:
            use()
        assert caught.value.hint
    assert listener.connections == []
    assert (strange_vault.seen, strange_vault.tokens) == ([], 0)


def test_an_azure_credential_reaches_its_own_vaults_alone() -> None:
    def covers(url: str, *hosts: str) -> bool:
        return AzureAccess("it", lambda: None, hosts=hosts, authority=None).covers(url)  # type: ignore[arg-type,return-value] # not made here

    for url in (
        "https://web.vault.azure.net",
        "https://web.managedhsm.azure.net",
        "https://w.vault.azure.cn",
    ):
        assert covers(url)
        assert not covers(url, "vault.example")
    for url in (
        "https://vault.azure.net",
        "https://web.vault.azure.net.evil.example",
        "https://web-vault.azure.net",
        "https://evilvault.azure.net",
        "https://web.vault.azure.net:8443",
        "https://[::1]",
    ):
        assert not covers(url)
    assert covers("https://vault.example:8443", "other", "vault.example:8443")
    assert not covers("https://vault.example", "vault.example:8443")
    assert not covers("https://a.vault.example", "vault.example")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider, listener: Listener, status: int
) -> None:
    strange_vault.answers = [Answer(status, b"", {"Location": f"{listener.url}/keys/web/"})]
    for use in uses(customer_managed, strange_vault.url):
        with pytest.raises(KeyProviderUnavailableError, match=rf"not answer like a key vault \({status}\)"):
            use()
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
    assert listener.connections == []


def test_a_challenge_cannot_send_the_credential_elsewhere(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider, listener: Listener
) -> None:
    strange_vault.challenge = lambda _: (
        f'Bearer authorization="{listener.url}/tenant", resource="https://other.example"'
    )
    strange_vault.answers = [bundle(strange_vault.url)]
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.ENABLED
    assert strange_vault.tokens == 1
    assert listener.connections == []


# --- No vault at all


def test_a_refused_connection_is_unreachable_and_no_verdict(
    strange_vault: StrangeVault, open_customer_managed: Open
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{unused.getsockname()[1]}"
        provider = open_customer_managed(strange_vault.credential_file(url=url))
        began = time.monotonic()
        with pytest.raises(KeyProviderUnavailableError, match=f"{url} does not answer: Connection refused"):
            provider.unwrap(wrapped_at(url), context=CONTEXT)
        assert provider.key_state(key_at(url)) is KeyState.UNREACHABLE
        assert time.monotonic() - began < 2


def test_a_silent_server_is_unreachable_and_no_verdict(
    strange_vault: StrangeVault, listener: Listener, open_customer_managed: Open
) -> None:
    provider = open_customer_managed(strange_vault.credential_file(url=listener.url), **SHORT)
    began = time.monotonic()
    with pytest.raises(KeyProviderUnavailableError, match=f"{listener.url} does not answer: timed out"):
        provider.unwrap(wrapped_at(listener.url), context=CONTEXT)
    assert time.monotonic() - began < 2
    assert provider.key_state(key_at(listener.url)) is KeyState.UNREACHABLE


def test_a_certificate_of_another_authority_is_refused(
    strange_vault: StrangeVault, open_customer_managed: Open
) -> None:
    provider = open_customer_managed(strange_vault.credential_file(ca=new_authority("other")[0]), **SHORT)
    for use in uses(provider, strange_vault.url):
        with pytest.raises(KeyProviderUnavailableError, match="its certificate is not trusted: "):
            use()
    assert provider.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
    assert (strange_vault.seen, strange_vault.tokens) == ([], 0)


@pytest.mark.parametrize("ca", ["", "no certificate"])
def test_a_credential_file_without_an_authority_trusts_no_server(
    strange_vault: StrangeVault, open_customer_managed: Open, ca: str
) -> None:
    path = strange_vault.credential_file()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ca_certificate": ca}))
    provider = open_customer_managed(path, **SHORT)
    assert provider.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
    with pytest.raises(KeyProviderUnavailableError):
        provider.unwrap(wrapped_at(strange_vault.url), context=CONTEXT)
    assert (strange_vault.seen, strange_vault.tokens) == ([], 0)

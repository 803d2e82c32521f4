from __future__ import annotations

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse_plugins.key_providers.key_urls import KeyVaultKey, is_key_version

VERSION = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("url", "vault_url", "name", "version"),
    [
        ("https://vault.example/keys/web", "https://vault.example", "web", None),
        ("https://vault.example/keys/web/", "https://vault.example", "web", None),
        (f"https://vault.example:8443/keys/web/{VERSION}", "https://vault.example:8443", "web", VERSION),
        (f"https://vault.example/keys/web/{VERSION.upper()}/", "https://vault.example", "web", VERSION),
        ("HTTPS://Vault.Example:443/keys/Web-1", "https://vault.example", "Web-1", None),
        ("https://127.0.0.1:65535/keys/a", "https://127.0.0.1:65535", "a", None),
        ("https://[::1]:8443/keys/a", "https://[::1]:8443", "a", None),
        ("https://[2001:DB8:0::1]/keys/a", "https://[2001:db8::1]", "a", None),
        (f"https://v/keys/{'k' * 127}", "https://v", "k" * 127, None),
        ("https://v/keys/keys", "https://v", "keys", None),
    ],
)
def test_a_key_url_is_split_into_its_parts(url: str, vault_url: str, name: str, version: str | None) -> None:
    key = KeyVaultKey.parse(url)
    assert key == KeyVaultKey(vault_url, name, version)
    assert key.url == f"{vault_url}/keys/{name}"
    assert KeyVaultKey.parse(key.url) == KeyVaultKey(vault_url, name)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "web",
        "*",
        "https://",
        "https://vault.example",
        "https://vault.example/keys",
        "https://vault.example/keys/",
        "https://vault.example/secrets/web",
        "https://vault.example/KEYS-/web",
        "http://vault.example/keys/web",
        "https:/vault.example/keys/web",
        "https:///keys/web",
        "//vault.example/keys/web",
        "https://vault.example:/keys/web",
        "https://vault.example:0/keys/web",
        "https://vault.example:08443/keys/web",
        "https://vault.example:65536/keys/web",
        "https://vault.example:84430000/keys/web",
        "https://vault.example:port/keys/web",
        "https://vault.example./keys/web",
        "https://.vault.example/keys/web",
        "https://vault..example/keys/web",
        "https://-vault.example/keys/web",
        f"https://{'a' * 64}.example/keys/web",
        f"https://{'.'.join(['a' * 60] * 5)}/keys/web",
        "https://v\u0430ult.example/keys/web",
        "https://vault.example\uff0fkeys/web",
        "https://vault.example\\.evil.example/keys/web",
        "https://vault example/keys/web",
        "https://[::1/keys/web",
        "https://[::g]/keys/web",
        "https://[1.2.3.4]/keys/web",
        "https://vault.example/keys//web",
        "https://vault.example//keys/web",
        "https://vault.example/keys/../web",
        "https://vault.example/keys/we%62",
        "https://vault.example/keys/w_b",
        "https://vault.example/keys/w\u00e9b",
        f"https://vault.example/keys/{'k' * 128}",
        f"https://vault.example/keys/web/{VERSION[1:]}",
        f"https://vault.example/keys/web/{VERSION}0",
        f"https://vault.example/keys/web/{'g' * 32}",
        f"https://vault.example/keys/web/{VERSION}/wrapkey",
        "https://vault.example/keys/web\n",
        "https://vault.example/keys/we\tb",
        "\0https://vault.example/keys/web",
        " https://vault.example/keys/web",
        "https://vault.example/keys/" + "k" * 10_000,
    ],
)
def test_any_other_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        KeyVaultKey.parse(url)
    assert "https://VAULT[:PORT]/keys/NAME" in str(caught.value.hint)
    assert len(str(caught.value)) < 1000
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("https://user:secret@vault.example/keys/web", "a user"),
        ("https://vault.example@evil.example/keys/web", "a user"),
        ("https://vault.example/keys/web?sig=secret", "a query"),
        ("https://vault.example/keys/web#secret", "a fragment"),
    ],
)
def test_a_url_that_may_hold_a_secret_is_not_shown(url: str, what: str) -> None:
    with pytest.raises(InvalidValueError, match=f"must not have {what}") as caught:
        KeyVaultKey.parse(url)
    assert "secret" not in str(caught.value)


def test_only_32_hexadecimal_digits_are_a_key_version() -> None:
    assert is_key_version(VERSION)
    for version in ("", VERSION.upper(), VERSION + "0", VERSION[1:], VERSION + "\n", "\u0660" * 32):
        assert not is_key_version(version)

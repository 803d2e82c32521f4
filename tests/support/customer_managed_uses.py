"""Every use of a customer-managed key, and answers of a key vault."""

from __future__ import annotations

import base64
from collections.abc import Callable
from uuid import UUID

from support.strange_vaults import Answer, document
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyProvider, WrappedDek
from virt_sse_plugins.key_providers.customer_managed import CustomerManagedKeyProvider

CONTEXT = DekContext(UUID(int=1), "service")
DEK = Dek(bytes(range(32)))
CIPHERTEXT = bytes(range(256))
VERSION = "0123456789abcdef" * 2
OTHER_VERSION = "f" * 32
SHORT = {"connection-timeout": 0.5, "read-timeout": 1.0}
JSON = {"Content-Type": "application/json"}

Open = Callable[..., CustomerManagedKeyProvider]
"""Given a credential file and options, opens a provider."""


def key_at(url: str) -> KeyId:
    return KeyId("customer-managed", f"{url}/keys/web", VERSION)


def wrapped_at(url: str) -> WrappedDek:
    return WrappedDek(CIPHERTEXT, "RSA-OAEP-256", key_at(url))


def uses(provider: KeyProvider, url: str) -> list[Callable[[], object]]:
    return [
        lambda: provider.current_key(f"{url}/keys/web"),
        lambda: provider.wrap(DEK, key_at(url), context=CONTEXT),
        lambda: provider.unwrap(wrapped_at(url), context=CONTEXT),
        lambda: provider.rotate(f"{url}/keys/web"),
    ]


def bundle(url: str, version: str = VERSION, name: str = "web", *, enabled: object = True) -> Answer:
    key = {"kid": f"{url}/keys/{name}/{version}", "kty": "RSA", "key_ops": ["wrapKey", "unwrapKey"]}
    return document(key=key, attributes={"enabled": enabled})


def result(url: str, value: object, version: str = VERSION, name: str = "web") -> Answer:
    return document(kid=f"{url}/keys/{name}/{version}", value=value)


def encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()

"""Azure Key Vault's JSON, in and out.

https://learn.microsoft.com/rest/api/keyvault/keys: KeyBundle, KeyItem, KeyCreateParameters and so on.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric import rsa

from virt_sse.vault.home.settings import VaultSettings
from virt_sse.vault.keys.records import KEY_OPERATIONS, Attributes, Deletion, KeyVersion, NewKey
from virt_sse.vault.properties import integer, moment, string, table
from virt_sse.vault.refusals import bad_parameter

_BASE64URL = re.compile(r"[A-Za-z0-9_-]*={0,2}\Z")
_EXPONENT = 65537
_MOST_TAGS = 15
_LONGEST_TAG = 256
_RSA_NUMBERS = ("n", "e", "d", "p", "q", "dp", "dq", "qi")
_KEY_TYPES = ("RSA", "RSA-HSM", "EC", "EC-HSM", "oct", "oct-HSM")


def parse(body: bytes) -> dict[str, object]:
    """Decode a request's body; an empty body is an empty object.

    :raise Refusal: When *body* is not one JSON object.
    """
    if not body:
        return {}
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise bad_parameter("The request body is not JSON.") from None
    if not isinstance(document, dict):
        raise bad_parameter("The request body must be a JSON object.")
    return document


def encode(value: bytes) -> str:
    """Encode as base64url without padding (RFC 7515 §2)."""
    return base64.urlsafe_b64encode(value).rstrip(b"=").decode()


def decode(document: Mapping[str, object], field: str) -> bytes:
    """Decode a base64url field.

    :raise Refusal: When the field is missing or not base64url.
    """
    text = string(document, field)
    try:
        if _BASE64URL.match(text):
            text = text.rstrip("=")
            return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error:
        pass
    raise bad_parameter(f"Property {field} is not base64url.")


def key_type(document: Mapping[str, object]) -> str:
    """Read ``kty``.

    :raise Refusal: When the value is not one of Azure's key types.
    """
    kty = string(document, "kty")
    if kty not in _KEY_TYPES:
        raise bad_parameter(f"Property kty: {kty[:32]!r} is not a key type.")
    return kty


def operations(document: Mapping[str, object]) -> tuple[str, ...] | None:
    """Read ``key_ops``, if given.

    :raise Refusal: When the value is no list of operations of an RSA key.
    """
    value = document.get("key_ops")
    if value is None:
        return None
    if not isinstance(value, list) or not all(item in KEY_OPERATIONS for item in value):
        raise bad_parameter(f"Property key_ops must be a list of values out of {', '.join(KEY_OPERATIONS)}.")
    return tuple(operation for operation in KEY_OPERATIONS if operation in value)


def tags(document: Mapping[str, object]) -> Mapping[str, str] | None:
    """Read ``tags``, if given.

    :raise Refusal: When tags are not strings, too many or too long.
    """
    if document.get("tags") is None:
        return None
    found: dict[str, str] = {}
    for name, value in table(document, "tags").items():
        if not isinstance(value, str) or len(name) > _LONGEST_TAG or len(value) > _LONGEST_TAG:
            raise bad_parameter(f"A tag is a string of at most {_LONGEST_TAG} characters.")
        found[name] = value
    if len(found) > _MOST_TAGS:
        raise bad_parameter(f"A key has at most {_MOST_TAGS} tags.")
    return found


def attributes(document: Mapping[str, object]) -> dict[str, bool | int | None]:
    """Read ``attributes`` into fields of :class:`~virt_sse.vault.keys.records.Attributes`.

    :raise Refusal: When an attribute is invalid.
    """
    given: dict[str, bool | int | None] = {}
    source = table(document, "attributes")
    if source.get("enabled") is not None:
        if not isinstance(source["enabled"], bool):
            raise bad_parameter("Property enabled must be true or false.")
        given["enabled"] = source["enabled"]
    for field, name in (("nbf", "not_before"), ("exp", "expires")):
        if field in source:
            given[name] = moment(source, field)
    if source.get("exportable"):
        raise bad_parameter("Keys of this vault cannot be exported.")
    return given


def refuse_unsupported(document: Mapping[str, object]) -> None:
    """Refuse choices of a new key that this vault does not offer, instead of making another key.

    :raise Refusal: For a release policy, an exportable key, a curve, and an exponent other than 65537.
    """
    if document.get("release_policy") is not None:
        raise bad_parameter("Property release_policy: keys of this vault cannot be released.")
    if document.get("crv") is not None:
        raise bad_parameter("Property crv: keys of this vault are RSA keys.")
    if integer(document, "public_exponent", _EXPONENT) != _EXPONENT:
        raise bad_parameter(f"Property public_exponent must be {_EXPONENT}.")


def new_key(document: Mapping[str, object], key: Mapping[str, object]) -> NewKey:
    """Read the properties of a create or import request.

    :param key: the object with ``key_ops``: the request itself, or its ``key``.
    """
    given = attributes(document)
    return NewKey(
        operations=operations(key) or (),
        attributes=Attributes(
            enabled=given.get("enabled") is not False,
            not_before=given.get("not_before"),
            expires=given.get("expires"),
        ),
        tags=tags(document) or {},
    )


def private_numbers(key: Mapping[str, object]) -> rsa.RSAPrivateNumbers:
    """Read the numbers of a JSON Web Key (RFC 7518 §6.3.2).

    :raise Refusal: When a number is missing.
    """
    n, e, d, p, q, dp, dq, qi = (int.from_bytes(decode(key, name), "big") for name in _RSA_NUMBERS)
    return rsa.RSAPrivateNumbers(p, q, d, dp, dq, qi, rsa.RSAPublicNumbers(e, n))


class Bundles:
    """Encodes keys as Azure's JSON.

    :param settings: for the vault's URL in key identifiers.
    """

    def __init__(self, settings: VaultSettings) -> None:
        self._settings = settings

    def identifier(self, record: KeyVersion) -> str:
        """``kid``."""
        return f"{self._settings.url}/keys/{record.name}/{record.version}"

    def key(self, record: KeyVersion) -> dict[str, object]:
        """Encode a KeyBundle."""
        public = record.public
        return {
            "key": {
                "kid": self.identifier(record),
                "kty": record.key_type,
                "key_ops": list(record.operations),
                "n": encode(public.n.to_bytes((public.bits + 7) // 8, "big")),
                "e": encode(public.e.to_bytes((public.e.bit_length() + 7) // 8, "big")),
            },
            "attributes": self._attributes(record),
            "tags": dict(record.tags),
        }

    def item(self, record: KeyVersion, *, with_version: bool) -> dict[str, object]:
        """Encode a KeyItem."""
        versionless = f"{self._settings.url}/keys/{record.name}"
        return {
            "kid": self.identifier(record) if with_version else versionless,
            "attributes": self._attributes(record),
            "tags": dict(record.tags),
        }

    def deleted(self, deletion: Deletion, name: str) -> dict[str, object]:
        """Encode the additional fields of a deleted key's bundle or item."""
        return {
            "recoveryId": f"{self._settings.url}/deletedkeys/{name}",
            "deletedDate": deletion.deleted,
            "scheduledPurgeDate": deletion.purge,
        }

    def _attributes(self, record: KeyVersion) -> dict[str, object]:
        given = record.attributes
        attributes: dict[str, object] = {
            "enabled": given.enabled,
            "created": record.created,
            "updated": record.updated,
            "recoveryLevel": self._settings.recovery_level,
            "recoverableDays": self._settings.retention_days,
            "exportable": False,
        }
        if given.not_before is not None:
            attributes["nbf"] = given.not_before
        if given.expires is not None:
            attributes["exp"] = given.expires
        return attributes

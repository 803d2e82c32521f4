"""Backups of keys: one encrypted blob per key, readable only by the vault that made the backup."""

from __future__ import annotations

import base64
import json
from typing import Any

from virt_sse.errors import VaultError
from virt_sse.vault.home.sealing import Sealer
from virt_sse.vault.keys.material import PublicKey
from virt_sse.vault.keys.records import Attributes, KeyVersion
from virt_sse.vault.keys.service import KeyService
from virt_sse.vault.keys.store import KeyStore
from virt_sse.vault.refusals import bad_parameter

_CONTEXT = b"backup"
_FORMAT = 1


class Backups:
    """Makes and reads backups: the database's records, with sealed private keys, sealed once more.

    The backup of an HSM key has only the key's location: restoring works while the HSM still has the key.
    """

    def __init__(self, store: KeyStore, keys: KeyService, sealer: Sealer) -> None:
        self._store = store
        self._keys = keys
        self._sealer = sealer

    def backup(self, name: str) -> bytes:
        """Back up all versions of a key, and its rotation policy.

        :raise Refusal: When there is no such key.
        """
        versions, policy = self._store.versions_and_policy(self._keys.named(name))
        document = {
            "format": _FORMAT,
            "policy": policy,
            "versions": [_document(record) for record in versions],
        }
        return self._sealer.seal(json.dumps(document).encode(), _CONTEXT)

    def restore(self, blob: bytes) -> KeyVersion:
        """Restore a key with its name and versions.

        :return: the newest version.
        :raise Refusal: When *blob* is no backup of this vault, the name is taken, or the HSM lost the key.
        """
        try:
            document = json.loads(self._sealer.open(blob, _CONTEXT))
        except VaultError:
            raise bad_parameter("This is not a backup of this vault.") from None
        if document["format"] != _FORMAT:
            raise bad_parameter("This backup was made by a newer version.")
        records = [_record(fields) for fields in document["versions"]]
        self._keys.restore(records, document["policy"])
        return records[-1]


def _document(record: KeyVersion) -> dict[str, object]:
    return {
        "name": record.name,
        "version": record.version,
        "key-type": record.key_type,
        "n": f"{record.public.n:x}",
        "e": record.public.e,
        "operations": record.operations,
        "enabled": record.attributes.enabled,
        "not-before": record.attributes.not_before,
        "expires": record.attributes.expires,
        "created": record.created,
        "updated": record.updated,
        "tags": dict(record.tags),
        "stored": base64.b64encode(record.stored).decode(),
    }


def _record(fields: dict[str, Any]) -> KeyVersion:
    return KeyVersion(
        name=fields["name"],
        version=fields["version"],
        key_type=fields["key-type"],
        public=PublicKey(int(fields["n"], 16), fields["e"]),
        operations=tuple(fields["operations"]),
        attributes=Attributes(fields["enabled"], fields["not-before"], fields["expires"]),
        created=fields["created"],
        updated=fields["updated"],
        tags=fields["tags"],
        stored=base64.b64decode(fields["stored"]),
    )

"""Azure Key Vault's REST interface for keys, one handler per operation."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Sequence
from urllib.parse import urlencode

from virt_sse.vault import properties
from virt_sse.vault.http import wire
from virt_sse.vault.http.calls import Call, Reply
from virt_sse.vault.keys.records import KeyVersion
from virt_sse.vault.refusals import bad_parameter, conflict

BACKUP_LIMIT = 32 << 20
"""Largest body of a backup's response and of a restore's request, in bytes: about 10,000 versions."""

_DEFAULT_BITS = 2048
_BACKUP_ENVELOPE = 1024
_PAGE = 25
_MOST_RANDOM_BYTES = 128


def create(call: Call) -> Reply:
    document = call.document()
    wire.refuse_unsupported(document)
    record = call.vault.keys.create(
        call.name,
        wire.key_type(document),
        properties.integer(document, "key_size", _DEFAULT_BITS),
        wire.new_key(document, document),
    )
    return _bundle(call, record)


def import_key(call: Call) -> Reply:
    """Import."""
    document = call.document()
    wire.refuse_unsupported(document)
    key = properties.table(document, "key")
    key_type = wire.key_type(key)
    if (document.get("Hsm") or document.get("hsm")) and not key_type.endswith("-HSM"):
        key_type += "-HSM"
    if not key_type.startswith("RSA"):
        raise bad_parameter(f"Property kty: {key_type!r} is not supported by this vault.")
    new = wire.new_key(document, key)
    return _bundle(call, call.vault.keys.import_key(call.name, key_type, wire.private_numbers(key), new))


def rotate(call: Call) -> Reply:
    return _bundle(call, call.vault.rotation.rotate(call.name))


def get(call: Call) -> Reply:
    return _bundle(call, call.vault.keys.get(call.name, call.version))


def update(call: Call) -> Reply:
    document = call.document()
    wire.refuse_unsupported(document)
    record = call.vault.keys.update(
        call.name,
        call.version,
        attributes=wire.attributes(document),
        operations=wire.operations(document),
        tags=wire.tags(document),
    )
    return _bundle(call, record)


def delete(call: Call) -> Reply:
    record, deletion = call.vault.keys.delete(call.name)
    bundles = call.bundles
    return Reply(bundles.key(record) | bundles.deleted(deletion, record.name))


def list_keys(call: Call) -> Reply:
    limit, after = _page(call)
    found = call.vault.keys.newest(after=after, limit=limit + 1)
    items = [call.bundles.item(record, with_version=False) for record in found[:limit]]
    return _list(call, items, [record.name for record in found], limit)


def list_versions(call: Call) -> Reply:
    limit, after = _page(call)
    found = call.vault.keys.versions(call.name)
    start = next((index + 1 for index, record in enumerate(found) if record.version == after), 0)
    found = found[start : start + limit + 1]
    items = [call.bundles.item(record, with_version=True) for record in found[:limit]]
    return _list(call, items, [record.version for record in found], limit)


def list_deleted(call: Call) -> Reply:
    limit, after = _page(call)
    found = call.vault.keys.deleted(after=after, limit=limit + 1)
    bundles = call.bundles
    items = [
        bundles.item(record, with_version=False) | bundles.deleted(deletion, record.name)
        for record, deletion in found[:limit]
    ]
    return _list(call, items, [record.name for record, _ in found], limit)


def get_deleted(call: Call) -> Reply:
    record, deletion = call.vault.keys.get_deleted(call.name)
    bundles = call.bundles
    return Reply(bundles.key(record) | bundles.deleted(deletion, record.name))


def purge(call: Call) -> Reply:
    call.vault.keys.purge(call.name)
    return Reply(None, 204)


def recover(call: Call) -> Reply:
    return _bundle(call, call.vault.keys.recover(call.name))


def backup(call: Call) -> Reply:
    value = wire.encode(call.vault.backups.backup(call.name))
    if len(value) > BACKUP_LIMIT - _BACKUP_ENVELOPE:  # restoring it would be refused
        raise conflict(f"Key {call.name} has too many versions for a backup.")
    return Reply({"value": value})


def restore(call: Call) -> Reply:
    record = call.vault.backups.restore(wire.decode(call.document(), "value"))
    return Reply(call.bundles.key(record), version=record.version, subject=f"/keys/{record.name}")


def get_policy(call: Call) -> Reply:
    return _policy(call, call.vault.rotation.policy(call.name))


def set_policy(call: Call) -> Reply:
    return _policy(call, call.vault.rotation.set_policy(call.name, call.document()))


def random_bytes(call: Call) -> Reply:
    count = properties.integer(call.document(), "count", 0)
    if not 1 <= count <= _MOST_RANDOM_BYTES:
        raise bad_parameter(f"Property count must be between 1 and {_MOST_RANDOM_BYTES}.")
    return Reply({"value": wire.encode(secrets.token_bytes(count))})


def _encrypt(operation: str, call: Call) -> Reply:
    document = call.document()
    record, value = call.vault.keys.encrypt(
        operation, call.name, call.version, properties.string(document, "alg"), wire.decode(document, "value")
    )
    return _result(call, record, value)


def _decrypt(operation: str, call: Call) -> Reply:
    document = call.document()
    record, value = call.vault.keys.decrypt(
        operation, call.name, call.version, properties.string(document, "alg"), wire.decode(document, "value")
    )
    return _result(call, record, value)


encrypt = functools.partial(_encrypt, "encrypt")
wrap = functools.partial(_encrypt, "wrapKey")
decrypt = functools.partial(_decrypt, "decrypt")
unwrap = functools.partial(_decrypt, "unwrapKey")


def unsupported(call: Call) -> Reply:
    """Refuse sign and verify."""
    raise bad_parameter("Property alg: keys of this vault cannot sign or verify, only wrap and encrypt.")


def _bundle(call: Call, record: KeyVersion) -> Reply:
    return Reply(call.bundles.key(record), version=record.version)


def _result(call: Call, record: KeyVersion, value: bytes) -> Reply:
    body = {"kid": call.bundles.identifier(record), "value": wire.encode(value)}
    return Reply(body, version=record.version)


def _policy(call: Call, policy: dict[str, object]) -> Reply:
    return Reply({"id": f"{call.vault.settings.url}/keys/{call.name}/rotationpolicy"} | policy)


def _page(call: Call) -> tuple[int, str]:
    """Read the page's size and the item before the page from the query."""
    given = call.query.get("maxresults", str(_PAGE))
    if not (given.isascii() and given.isdigit()) or len(given) > 3 or not 1 <= int(given) <= _PAGE:
        raise bad_parameter(f"maxresults must be between 1 and {_PAGE}.")
    return int(given), call.query.get("$skiptoken", "")


def _list(call: Call, items: Sequence[object], tokens: Sequence[str], limit: int) -> Reply:
    """Build a page, with a link to the next page if there are more than *limit* items."""
    link = None
    if len(tokens) > limit:
        query = dict(call.query) | {"$skiptoken": tokens[limit - 1], "maxresults": str(limit)}
        link = f"{call.vault.settings.url}{call.path['path']}?{urlencode(query)}"
    return Reply({"value": items, "nextLink": link})

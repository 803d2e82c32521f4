"""The vault's operations: paths, required permissions and handlers."""

from __future__ import annotations

from dataclasses import dataclass

from virt_sse.vault.http import identity_api, key_api
from virt_sse.vault.http.calls import Handler
from virt_sse.vault_client.permissions import Permission

_BODY_LIMIT = 64 << 10


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of the vault.

    :ivar action: the operation's name in the audit log.
    :ivar permission: the permission required; ``None`` for operations whose handler checks the caller's role.
    :ivar subject: the object of the request, for the audit log.
    :ivar announced: record the request before it runs, too: an irreversible operation must not go unrecorded.
    :ivar slow: may take seconds, and runs in a pool of its own so that quick operations need not wait.
    :ivar recorded: record allowed requests, too. Not so for reading: key watches read every second.
    """

    method: str
    path: str
    action: str
    handler: Handler
    permission: Permission | None
    subject: str = "/keys/{name}"
    announced: bool = False
    slow: bool = False
    recorded: bool = True
    body_limit: int = _BODY_LIMIT

    @property
    def is_azures(self) -> bool:
        """Whether Azure Key Vault has the operation, which then needs an ``api-version``."""
        return self.permission is not None


def _read(path: str, action: str, handler: Handler, permission: Permission | None, subject: str) -> Operation:
    return Operation("GET", path, action, handler, permission, subject, recorded=False)


def _change(
    method: str,
    path: str,
    action: str,
    handler: Handler,
    permission: Permission | None,
    *,
    subject: str = "/keys/{name}",
    slow: bool = False,
    body_limit: int = _BODY_LIMIT,
) -> Operation:
    return Operation(
        *(method, path, action, handler, permission, subject),
        announced=True,
        slow=slow,
        body_limit=body_limit,
    )


_KEY, _KEYS = "/keys/{name}", "/keys"
_VERSION = "/keys/{name}/{version:segment}"
_DELETED = "/deletedkeys/{name}"
_PRINCIPAL, _PRINCIPALS = "/identity/principals/{name}", "/identity/principals"
_POLICY, _POLICIES = "/access/policies/{name}", "/access/policies"

OPERATIONS = (
    # Azure Key Vault's operations. Paths with fixed segments precede paths with variable segments.
    _read("/keys", "list", key_api.list_keys, Permission.LIST, _KEYS),
    _read("/deletedkeys", "list-deleted", key_api.list_deleted, Permission.LIST, _KEYS),
    _change(
        *("POST", "/keys/restore", "restore", key_api.restore, Permission.RESTORE),
        subject=_KEYS,
        slow=True,
        body_limit=key_api.BACKUP_LIMIT,
    ),
    Operation("POST", "/rng", "random", key_api.random_bytes, Permission.GET, "/rng"),
    _change("POST", f"{_KEY}/create", "create", key_api.create, Permission.CREATE, slow=True),
    _change("POST", f"{_KEY}/rotate", "rotate", key_api.rotate, Permission.ROTATE, slow=True),
    Operation("POST", f"{_KEY}/backup", "backup", key_api.backup, Permission.BACKUP, slow=True),
    _read(f"{_KEY}/versions", "list-versions", key_api.list_versions, Permission.LIST, _KEY),
    _read(f"{_KEY}/rotationpolicy", "get-policy", key_api.get_policy, Permission.GET_ROTATION_POLICY, _KEY),
    _change(
        "PUT", f"{_KEY}/rotationpolicy", "set-policy", key_api.set_policy, Permission.SET_ROTATION_POLICY
    ),
    _change("PUT", _KEY, "import", key_api.import_key, Permission.IMPORT, slow=True),
    _change("DELETE", _KEY, "delete", key_api.delete, Permission.DELETE),
    _read(_KEY, "get", key_api.get, Permission.GET, _KEY),
    _read(_VERSION, "get", key_api.get, Permission.GET, _KEY),
    _change("PATCH", _KEY, "update", key_api.update, Permission.UPDATE),
    _change("PATCH", _VERSION, "update", key_api.update, Permission.UPDATE),
    Operation("POST", f"{_VERSION}/wrapkey", "wrap", key_api.wrap, Permission.WRAP_KEY),
    Operation("POST", f"{_VERSION}/unwrapkey", "unwrap", key_api.unwrap, Permission.UNWRAP_KEY),
    Operation("POST", f"{_VERSION}/encrypt", "encrypt", key_api.encrypt, Permission.ENCRYPT),
    Operation("POST", f"{_VERSION}/decrypt", "decrypt", key_api.decrypt, Permission.DECRYPT),
    Operation("POST", f"{_VERSION}/sign", "sign", key_api.unsupported, Permission.GET),
    Operation("POST", f"{_VERSION}/verify", "verify", key_api.unsupported, Permission.GET),
    _read(_DELETED, "get-deleted", key_api.get_deleted, Permission.GET, _KEY),
    _change("DELETE", _DELETED, "purge", key_api.purge, Permission.PURGE),
    _change("POST", f"{_DELETED}/recover", "recover", key_api.recover, Permission.RECOVER),
    # Operations of this vault only.
    _read("/status", "status", identity_api.status, None, "/status"),
    _read(_PRINCIPALS, "list-principals", identity_api.list_principals, None, _PRINCIPALS),
    _change(
        "POST", _PRINCIPALS, "create-principal", identity_api.create_principal, None, subject=_PRINCIPALS
    ),
    _read(_PRINCIPAL, "get-principal", identity_api.get_principal, None, _PRINCIPAL),
    _change("PATCH", _PRINCIPAL, "change-principal", identity_api.change_principal, None, subject=_PRINCIPAL),
    _change(
        "DELETE", _PRINCIPAL, "delete-principal", identity_api.delete_principal, None, subject=_PRINCIPAL
    ),
    _read(_POLICIES, "list-access", identity_api.list_policies, None, _POLICIES),
    _read(_POLICY, "get-access", identity_api.get_policy, None, _POLICY),
    _change("PUT", _POLICY, "set-access", identity_api.set_policy, None, subject=_POLICY),
    _change("PATCH", _POLICY, "change-access", identity_api.adjust_policy, None, subject=_POLICY),
    _change("DELETE", _POLICY, "remove-access", identity_api.remove_policy, None, subject=_POLICY),
)

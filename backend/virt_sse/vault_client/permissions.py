"""What can be granted, and to whom managing is entrusted."""

from __future__ import annotations

import enum


class Permission(enum.Enum):
    """What a principal may do with the vault's keys: Azure's names for key permissions."""

    GET = "get"
    LIST = "list"
    CREATE = "create"
    IMPORT = "import"
    UPDATE = "update"
    DELETE = "delete"
    RECOVER = "recover"
    PURGE = "purge"
    BACKUP = "backup"
    RESTORE = "restore"
    ROTATE = "rotate"
    GET_ROTATION_POLICY = "getrotationpolicy"
    SET_ROTATION_POLICY = "setrotationpolicy"
    WRAP_KEY = "wrapKey"
    UNWRAP_KEY = "unwrapKey"
    ENCRYPT = "encrypt"
    DECRYPT = "decrypt"


USE = frozenset({Permission.WRAP_KEY, Permission.UNWRAP_KEY, Permission.ENCRYPT, Permission.DECRYPT})
"""Using keys. The others administer them."""

ADMINISTRATION = frozenset(Permission) - USE
"""What the first administrator has from the start: everything but using keys."""


class Role(enum.Enum):
    """What a principal may do about principals."""

    NONE = "none"
    IDENTITY_OPERATOR = "identity-operator"
    """May make identities that have no rights, and delete those which it made."""

    ADMINISTRATOR = "administrator"
    """May make and delete any principal, and grant."""

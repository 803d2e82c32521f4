"""Permissions on keys, and roles in administration."""

from __future__ import annotations

import enum


class Permission(enum.Enum):
    """A permission on the vault's keys, with Azure's name."""

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
"""The permissions to use keys; all other permissions are for administration."""

ADMINISTRATION = frozenset(Permission) - USE
"""The first administrator's permissions: all except the use of keys."""


class Role(enum.Enum):
    """A role in the administration of principals."""

    NONE = "none"
    IDENTITY_OPERATOR = "identity-operator"
    """May create principals without permissions, and delete its own creations."""

    ADMINISTRATOR = "administrator"
    """May create and delete any principal, and grant permissions."""

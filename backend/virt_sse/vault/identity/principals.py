"""Principals: identities and their permissions."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from sqlalchemy.engine import Connection, Row

from virt_sse.vault.home import tables
from virt_sse.vault.home.database import Database
from virt_sse.vault.refusals import Refusal, bad_parameter, conflict, forbidden
from virt_sse.vault_client.permissions import Permission, Role

_NAME = re.compile(r"[0-9a-zA-Z][0-9a-zA-Z._-]{0,127}\Z")
_SHORTEST_RSA = 2048


class Unchanged(enum.Enum):
    """Stands for a property to keep, where ``None`` is a value."""

    UNCHANGED = enum.auto()


AssertionKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@dataclass(frozen=True, slots=True)
class Principal:
    """An identity known to the vault.

    :ivar client_id: identifies the principal in token requests.
    :ivar object_id: identifies the principal in access tokens and policies.
    :ivar public_key: verifies the principal's client assertions; PEM.
    :ivar expires: when the principal expires; seconds since 1970.
    :ivar created_by: the creating principal; ``None`` for principals made by ``vault init``.
    :ivar permissions: on all keys.
    :ivar key_permissions: further permissions on single keys, by their names in lower case.
    """

    client_id: str
    object_id: str
    name: str
    public_key: str = field(repr=False)
    role: Role
    enabled: bool
    expires: int | None
    created: int
    created_by: str | None
    permissions: frozenset[Permission]
    key_permissions: Mapping[str, frozenset[Permission]] = field(default_factory=dict)

    def may(self, permission: Permission, key: str) -> bool:
        """Check for a permission on a key, by its name; the empty name stands for all keys."""
        return permission in self.permissions or permission in self.key_permissions.get(key.lower(), ())

    def active(self, now: float) -> bool:
        """Check that the principal is enabled and not expired."""
        return self.enabled and (self.expires is None or now < self.expires)


class Principals:
    """All principals, cached in memory. Thread-safe.

    Each change is one transaction around reading, checking and writing.
    Methods that change principals raise :class:`~virt_sse.vault.refusals.Refusal`.
    """

    def __init__(self, database: Database, *, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._by_id: dict[str, Principal] = {}
        self.reload()

    def all(self) -> list[Principal]:
        """List the principals, by name."""
        return sorted({p.client_id: p for p in self._by_id.values()}.values(), key=lambda p: p.name)

    def find(self, identifier: str) -> Principal | None:
        """Find a principal by client id or object id."""
        return self._by_id.get(identifier)

    def get(self, identifier: str) -> Principal:
        """Return a principal by client id, object id or name.

        :raise Refusal: When there is no such principal.
        """
        found = self.find(identifier) or next((p for p in self.all() if p.name == identifier), None)
        if found is None:
            raise _not_found(identifier)
        return found

    def create(
        self,
        name: str,
        public_key: str,
        *,
        role: Role = Role.NONE,
        expires: int | None = None,
        created_by: str | None = None,
        permissions: Iterable[Permission] = (),
    ) -> Principal:
        """Add a principal with the given role and permissions only."""
        if not _NAME.match(name):
            raise bad_parameter(
                "A principal's name is 1 to 128 letters, digits, dots, hyphens and underscores."
            )
        if _is_id(
            name
        ):  # else a grant to the id of a deleted principal would go to the principal of that name
            raise bad_parameter(
                "A principal's name must not be a UUID: principals are also named by their ids."
            )
        load_assertion_key(public_key)
        principal = Principal(
            client_id=str(uuid.uuid4()),
            object_id=str(uuid.uuid4()),
            name=name,
            public_key=public_key,
            role=role,
            enabled=True,
            expires=expires,
            created=int(self._clock()),
            created_by=created_by,
            permissions=frozenset(permissions),
        )
        values = {column.name: getattr(principal, column.name) for column in tables.principals.c} | {
            "role": role.value
        }
        with self._changing() as connection:
            if any(p.name == name for p in _read(connection).values()):
                raise conflict(f"A principal named {name} exists already.", "PrincipalAlreadyExists")
            connection.execute(tables.principals.insert().values(values))
            _set_permissions(connection, principal)
        return principal

    def change(
        self,
        principal: Principal,
        *,
        enabled: bool | Unchanged = Unchanged.UNCHANGED,
        expires: int | Unchanged | None = Unchanged.UNCHANGED,
    ) -> Principal:
        """Enable or disable a principal, and set its expiry; properties not given are kept."""
        with self._changing() as connection:
            present = _read(connection)
            changed = _of(present, principal)
            if not isinstance(enabled, Unchanged):
                changed = dataclasses.replace(changed, enabled=enabled)
            if not isinstance(expires, Unchanged):
                changed = dataclasses.replace(changed, expires=expires)
            _keep_an_administrator(present, changed)
            connection.execute(
                tables.principals.update()
                .where(tables.principals.c.client_id == changed.client_id)
                .values(enabled=changed.enabled, expires=changed.expires)
            )
        return changed

    def grant(
        self, principal: Principal, permissions: Iterable[Permission], *, key: str | None = None
    ) -> Principal:
        """Set a principal's permissions, replacing earlier permissions.

        :param key: name of the key; ``None`` for the permissions on all keys.
        """
        granted = frozenset(permissions)
        return self._set(principal, key, lambda _present: granted)

    def adjust(
        self,
        principal: Principal,
        *,
        granted: Iterable[Permission],
        revoked: Iterable[Permission],
        key: str | None = None,
    ) -> Principal:
        """Add permissions to a principal, and remove others; permissions not named are kept.

        :param key: as for :meth:`grant`.
        """
        added, removed = frozenset(granted), frozenset(revoked)
        return self._set(principal, key, lambda present: (present | added) - removed)

    def revoke_all(self, principal: Principal) -> Principal:
        """Remove all permissions of a principal, those on single keys included."""
        with self._changing() as connection:
            found = _of(_read(connection), principal)
            changed = dataclasses.replace(found, permissions=frozenset(), key_permissions={})
            _set_permissions(connection, changed)
        return changed

    def delete(self, principal: Principal) -> None:
        """Delete a principal with its permissions; its access tokens are invalid from now on."""
        with self._changing() as connection:
            present = _read(connection)
            found = _of(present, principal)
            _keep_an_administrator(present, dataclasses.replace(found, enabled=False))
            connection.execute(
                tables.principals.delete().where(tables.principals.c.client_id == found.client_id)
            )

    def reload(self) -> None:
        """Read all principals again, after a change of other parts of the vault or by another instance."""
        with self._lock:  # the newest content stays
            with self._database.reading() as connection:
                found = _read(connection)
            self._by_id = found | {p.object_id: p for p in found.values()}

    def _set(
        self,
        principal: Principal,
        key: str | None,
        permissions: Callable[[frozenset[Permission]], frozenset[Permission]],
    ) -> Principal:
        with self._changing() as connection:
            found = _of(_read(connection), principal)
            if key is None:
                changed = dataclasses.replace(found, permissions=permissions(found.permissions))
            else:
                name = key.lower()
                present = found.key_permissions.get(name, frozenset())
                on_keys = {**found.key_permissions, name: permissions(present)}
                changed = dataclasses.replace(found, key_permissions=on_keys)
            _set_permissions(connection, changed)
        return changed

    @contextlib.contextmanager
    def _changing(self) -> Iterator[Connection]:
        """Open a transaction for a change, and reload the cache afterwards."""
        try:
            with self._database.writing() as connection:
                yield connection
        finally:  # a commit may succeed although its answer is lost
            self.reload()


def load_assertion_key(pem: str) -> AssertionKey:
    """Load the public key for a principal's client assertions.

    :raise Refusal: When *pem* is no public key, or a weak key.
    """
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm, UnicodeEncodeError):
        raise bad_parameter("The public key is not a public key in PEM.") from None
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= _SHORTEST_RSA:
        return key
    raise bad_parameter(
        f"The public key must be of the curve P-256, or RSA of at least {_SHORTEST_RSA} bits."
    )


def _is_id(name: str) -> bool:
    try:
        uuid.UUID(name)
    except ValueError:
        return False
    return True


def _read(connection: Connection) -> dict[str, Principal]:
    """Read all principals, by client id."""
    query = sa.select(tables.principals, tables.permissions.c.permission).select_from(
        tables.principals.outerjoin(tables.permissions)
    )
    rows: dict[str, list[Row[Any]]] = {}
    for row in connection.execute(query):
        rows.setdefault(row.client_id, []).append(row)
    on_keys: dict[str, dict[str, frozenset[Permission]]] = {}
    for row in connection.execute(sa.select(tables.key_permissions)):
        of_principal = on_keys.setdefault(row.client_id, {})
        of_principal[row.key] = of_principal.get(row.key, frozenset()) | {Permission(row.permission)}
    return {client_id: _principal(group, on_keys.get(client_id, {})) for client_id, group in rows.items()}


def _of(present: Mapping[str, Principal], principal: Principal) -> Principal:
    """Find the present state of *principal*, by its client id only: its name may have a new owner."""
    try:
        return present[principal.client_id]
    except KeyError:
        raise _not_found(principal.name) from None


def _not_found(identifier: str) -> Refusal:
    return Refusal(404, "PrincipalNotFound", f"There is no principal {identifier[:128]!r}.")


def _keep_an_administrator(present: Mapping[str, Principal], changed: Principal) -> None:
    """Refuse to remove the last administrator: nobody could administer the vault any more."""
    others = [p for p in present.values() if p.client_id != changed.client_id]
    if changed.role is Role.ADMINISTRATOR and not any(
        p.role is Role.ADMINISTRATOR and p.enabled and p.expires is None for p in [*others, changed]
    ):
        raise forbidden("This is the last administrator.", "LastAdministrator")


def _set_permissions(connection: Connection, principal: Principal) -> None:
    table = tables.permissions
    connection.execute(table.delete().where(table.c.client_id == principal.client_id))
    for permission in principal.permissions:
        connection.execute(table.insert().values(client_id=principal.client_id, permission=permission.value))
    table = tables.key_permissions
    connection.execute(table.delete().where(table.c.client_id == principal.client_id))
    for key, permissions in principal.key_permissions.items():
        for permission in permissions:
            values = {"client_id": principal.client_id, "key": key, "permission": permission.value}
            connection.execute(table.insert().values(values))


def _principal(rows: list[Row[Any]], on_keys: Mapping[str, frozenset[Permission]]) -> Principal:
    first = rows[0]
    return Principal(
        client_id=first.client_id,
        object_id=first.object_id,
        name=first.name,
        public_key=first.public_key,
        role=Role(first.role),
        enabled=first.enabled,
        expires=first.expires,
        created=first.created,
        created_by=first.created_by,
        permissions=frozenset(Permission(row.permission) for row in rows if row.permission is not None),
        key_permissions=on_keys,
    )

"""The key vault's rules: which operations are allowed on a key, and when."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from cryptography.hazmat.primitives.asymmetric import rsa

from virt_sse.errors import VaultError
from virt_sse.vault.home.settings import Tier, VaultSettings
from virt_sse.vault.keys.disposal import Disposal
from virt_sse.vault.keys.material import ALGORITHMS, KEY_SIZES, Protection, PublicKey, private_key
from virt_sse.vault.keys.opened_keys import OpenedKey, OpenedKeys
from virt_sse.vault.keys.records import (
    KEY_OPERATIONS,
    Attributes,
    Deletion,
    KeyVersion,
    Leftover,
    NewKey,
    check_name,
    check_version,
    new_version,
)
from virt_sse.vault.keys.store import KeyStore
from virt_sse.vault.refusals import FailureRefusal, Refusal, bad_parameter, conflict, forbidden

_DAY = 86400
_OPENED_KEYS = 1024
_HARDWARE_TYPES = ("RSA-HSM", "EC-HSM")
_WITHIN_THE_WINDOW = frozenset({"wrapKey", "encrypt"})


class KeyService:
    """Keys, by name and version. Synchronous and thread-safe.

    Every method may raise :class:`~virt_sse.vault.refusals.Refusal`.

    :param protections: the protection backends, each for its key type.
    :param purged: called after a purge, which has ended the permissions on the key.
    :param clock: seconds since 1970.
    """

    def __init__(
        self,
        store: KeyStore,
        settings: VaultSettings,
        protections: Iterable[Protection],
        *,
        purged: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._settings = settings
        self._protections = {protection.key_type: protection for protection in protections}
        self._disposal = Disposal(store, self._protections, clock)
        self._purged = purged
        self._clock = clock
        self._opened = OpenedKeys(_OPENED_KEYS)

    def named(self, name: str) -> str:
        """The name of a key, live or deleted, in the case of its creation; *name* itself without such a key.

        Names differ by more than case, as in Azure.
        """
        return self._store.present_name(check_name(name)) or name

    def existing(self, name: str) -> str:
        """The name of a live key, in the case of its creation."""
        return self._store.get(self.named(name)).name

    def create(self, name: str, key_type: str, bits: int, new: NewKey) -> KeyVersion:
        """Make a key, or a new version of an existing key."""
        protection = self._backend_for_new(key_type)
        if bits not in KEY_SIZES:
            raise bad_parameter("An RSA key has 2048, 3072 or 4096 bits.")
        _check_window(new.attributes)
        return self._add(name, protection, lambda version: protection.generate(bits, name, version), new)

    def import_key(self, name: str, key_type: str, numbers: rsa.RSAPrivateNumbers, new: NewKey) -> KeyVersion:
        """Import a private key, as a new key or a new version of an existing key."""
        protection, private = self._backend_for_new(key_type), private_key(numbers)
        _check_window(new.attributes)
        return self._add(name, protection, lambda version: protection.import_key(private, name, version), new)

    def rotate(self, name: str, expiry: Callable[[KeyVersion, str | None], int | None]) -> KeyVersion:
        """Make a new version with the newest version's properties; older versions stay usable.

        :param expiry: called with the newest version and the rotation policy in the transaction of the
            rotation, for the new version's expiry; a refusal prevents the rotation.
        """
        name = self.named(name)
        like = self._store.get(name)
        protection, bits = self._backend_for_new(like.key_type), like.public.bits

        def add(made: KeyVersion) -> KeyVersion:
            def rotated(newest: KeyVersion, policy: str | None) -> KeyVersion:
                if (newest.key_type, newest.public.bits) != (like.key_type, bits):
                    raise conflict(f"Key {name} was replaced during the rotation.")
                attributes = Attributes(expires=expiry(newest, policy))
                return dataclasses.replace(
                    made, operations=newest.operations, tags=newest.tags, attributes=attributes
                )

            return self._store.add_rotated(name, rotated, announced=protection.outside)

        return self._add(
            *(name, protection, lambda version: protection.generate(bits, name, version), NewKey()), add=add
        )

    def get(self, name: str, version: str = "") -> KeyVersion:
        """Return a version, by default the newest; disabled and expired versions included."""
        return self._store.get(self.named(name), check_version(version))

    def versions(self, name: str) -> list[KeyVersion]:
        """List all versions, oldest first."""
        return self._store.versions(self.named(name))

    def newest(self, *, after: str, limit: int) -> list[KeyVersion]:
        """List the newest versions of the keys with names after *after*, by name."""
        return self._store.newest(after=after, limit=limit)

    def update(
        self,
        name: str,
        version: str,
        *,
        attributes: Mapping[str, bool | int | None],
        operations: tuple[str, ...] | None,
        tags: Mapping[str, str] | None,
    ) -> KeyVersion:
        """Change the given properties, keep all others.

        :param attributes: fields of :class:`~virt_sse.vault.keys.records.Attributes`.
        """

        def changed(record: KeyVersion) -> KeyVersion:
            record = dataclasses.replace(
                record,
                attributes=dataclasses.replace(record.attributes, **attributes),  # type: ignore[arg-type] # its fields
                operations=record.operations if operations is None else operations,
                tags=record.tags if tags is None else tags,
                updated=int(self._clock()),
            )
            _check_window(record.attributes)
            return record

        try:
            return self._store.change(self.named(name), check_version(version), changed)
        finally:  # a commit may succeed although its answer is lost
            self._opened.forget(name.lower())

    def delete(self, name: str) -> tuple[KeyVersion, Deletion]:
        """Delete a key with all its versions, recoverably."""
        now = int(self._clock())
        deletion = Deletion(now, now + self._settings.retention_days * _DAY)
        try:
            return self._store.delete(self.named(name), deletion), deletion
        finally:
            self._opened.forget(name.lower())

    def deleted(self, *, after: str, limit: int) -> list[tuple[KeyVersion, Deletion]]:
        """List the deleted keys with names after *after*, by name."""
        return self._store.deleted(after=after, limit=limit)

    def get_deleted(self, name: str) -> tuple[KeyVersion, Deletion]:
        """Return a deleted key."""
        return self._store.get_deleted(self.named(name))

    def recover(self, name: str) -> KeyVersion:
        """Recover a deleted key."""
        return self._store.recover(self.named(name))

    def purge(self, name: str) -> None:
        """Purge a deleted key irrecoverably; data wrapped with the key is lost."""
        if self._settings.purge_protection:
            raise forbidden(
                'Operation "purge" is not allowed because purge protection is enabled for this vault.',
                "PurgeProtectionEnabled",
            )
        name = self.named(name)
        self._store.get_deleted(name)
        for key_type in self._store.key_types(name):
            self._backend_of(key_type).require()
        self._purge(name, due=None)

    def due_for_purge(self) -> list[str]:
        """List the names of the deleted keys whose retention period has ended."""
        return self._store.due_for_purge(int(self._clock()))

    def purge_due(self, name: str) -> None:
        """Purge a key whose retention period has ended, whatever the purge protection.

        Unreachable material outside the database is destroyed by a later :meth:`sweep`.
        """
        self._purge(name, due=int(self._clock()))

    def sweep(self, *, alone: bool = False) -> None:
        """Destroy material outside the database that no key refers to.

        :param alone: whether no key is being made now, by any instance.
        """
        self._disposal.sweep(alone=alone)

    def forget_opened(self) -> None:
        """Read keys from the database again, after a change by another instance."""
        self._opened.forget_all()

    def restore(self, records: Sequence[KeyVersion], policy: str | None) -> None:
        """Restore a key from the records of its backup, oldest version first.

        Material outside the database must still exist.
        """
        backends = {key_type: self._backend_of(key_type) for key_type in {each.key_type for each in records}}
        for backend in backends.values():
            backend.require()  # an HSM that does not answer must not block the vault's changes

        def check(record: KeyVersion) -> None:
            if backends[record.key_type].outside:
                self._require(record)

        self._store.restore(records, policy, check)

    def count(self) -> tuple[int, int]:
        """Count the live keys and the deleted keys."""
        return self._store.count()

    def encrypt(
        self, operation: str, name: str, version: str, algorithm: str, plaintext: bytes
    ) -> tuple[KeyVersion, bytes]:
        """Encrypt or wrap.

        :param operation: ``encrypt`` or ``wrapKey``.
        :return: the version used, and the ciphertext.
        """
        key = self._usable(operation, name, version, algorithm)
        key.material.require()
        return key.record, key.record.public.encrypt(plaintext, algorithm)

    def decrypt(
        self, operation: str, name: str, version: str, algorithm: str, ciphertext: bytes
    ) -> tuple[KeyVersion, bytes]:
        """Decrypt or unwrap.

        :param operation: ``decrypt`` or ``unwrapKey``.
        :return: the version used, and the plaintext.
        """
        key = self._usable(operation, name, version, algorithm)
        return key.record, key.material.decrypt(ciphertext, algorithm)

    def _usable(self, operation: str, name: str, version: str, algorithm: str) -> OpenedKey:
        if algorithm not in ALGORITHMS:
            raise bad_parameter(
                f"Property alg: {algorithm[:32]!r} is not supported; use RSA-OAEP-256 or RSA-OAEP."
            )
        check_name(name)
        check_version(version)
        key = self._opened_key(name, version)
        if self._refusal_of(operation, key.record) is not None:
            self._opened.forget(name.lower())  # another instance may just have enabled the key
            key = self._opened_key(name, version)
        refusal = self._refusal_of(operation, key.record)
        if refusal is not None:
            raise refusal
        return key

    def _opened_key(self, name: str, version: str) -> OpenedKey:
        return self._opened.get(
            name.lower(), version, lambda: self._open(self._store.get(self.named(name), version))
        )

    def _refusal_of(self, operation: str, record: KeyVersion) -> Refusal | None:
        attributes = record.attributes
        if not attributes.enabled:
            return forbidden(f"Operation {operation} is not allowed on a disabled key.", "KeyDisabled")
        if operation not in record.operations:
            return forbidden(f"Operation {operation} is not permitted on this key.", "KeyOperationForbidden")
        if operation in _WITHIN_THE_WINDOW:
            now = self._clock()
            if attributes.not_before is not None and now < attributes.not_before:
                return forbidden(
                    f"Operation {operation} is not allowed on a not yet valid key.", "KeyNotYetValid"
                )
            if attributes.expires is not None and now >= attributes.expires:
                return forbidden(f"Operation {operation} is not allowed on an expired key.", "KeyExpired")
        return None

    def _purge(self, name: str, *, due: int | None) -> None:
        outside = [each.key_type for each in self._protections.values() if each.outside]
        try:
            self._store.purge(name, kept_outside=outside, due=due)
        finally:  # a commit may succeed although its answer is lost
            self._purged()
        self.sweep()

    def _open(self, record: KeyVersion) -> OpenedKey:
        backend = self._backend_of(record.key_type)
        material = backend.open(record.stored, record.name, record.version)
        if material.public != record.public:  # who writes to the database would read what the key wraps
            raise VaultError(
                f"key {record.name}/{record.version} has another key's public key in the database"
            )
        return OpenedKey(record, material)

    def _require(self, record: KeyVersion) -> None:
        """Check that a version from a backup can be used."""
        try:
            self._open(record).material.require()
        except Refusal as refusal:
            if isinstance(refusal, FailureRefusal):
                raise
            raise conflict(
                f"Version {record.version} of key {record.name} is no longer in the HSM, and a backup does "
                "not contain the private key of an HSM key."
            ) from refusal

    def _backend_for_new(self, key_type: str) -> Protection:
        """Choose the protection backend for a new key of that type."""
        protection = self._protections.get(key_type)
        if protection is not None:
            return protection
        if key_type in _HARDWARE_TYPES and self._settings.tier is Tier.STANDARD:  # Azure's words
            raise Refusal(403, "Forbidden", "Hardware key operation not allowed on standard vault.")
        if key_type == "RSA-HSM":
            raise Refusal(
                403,
                "Forbidden",
                "This vault has no HSM for hardware-protected keys; 'virt-sse vault hsm add' adds an HSM.",
            )
        raise bad_parameter(f"Property kty: {key_type[:32]!r} is not supported by this vault.")

    def _backend_of(self, key_type: str) -> Protection:
        """Choose the protection backend of existing keys of that type; refuse with 503 if it is missing."""
        try:
            return self._protections[key_type]
        except KeyError:
            raise FailureRefusal(
                "The vault cannot reach the protection backend of this key.",
                f"the vault's settings name no protection backend for keys of type {key_type}",
            ) from None

    def _add(
        self,
        name: str,
        protection: Protection,
        make: Callable[[str], tuple[PublicKey, bytes]],
        new: NewKey,
        *,
        add: Callable[[KeyVersion], KeyVersion] | None = None,
    ) -> KeyVersion:
        """Add a version.

        :param make: makes the material of a given version.
        :param add: stores the version, in one transaction, and returns the stored version.
        """
        name, version = self.named(name), new_version()
        leftover = Leftover(name, version, protection.key_type)
        with self._disposal.making(leftover) if protection.outside else contextlib.nullcontext():
            public, stored = make(version)
            now = int(self._clock())
            record = KeyVersion(
                name=name,
                version=version,
                key_type=protection.key_type,
                public=public,
                operations=new.operations or KEY_OPERATIONS,
                attributes=new.attributes,
                created=now,
                updated=now,
                tags=new.tags,
                stored=stored,
            )
            try:
                return add(record) if add else self._store.add(record, announced=protection.outside)
            finally:
                self._opened.forget(name.lower())


def _check_window(attributes: Attributes) -> None:
    start, end = attributes.not_before, attributes.expires
    if start is not None and end is not None and start >= end:
        raise bad_parameter("Property nbf must be earlier than exp.")

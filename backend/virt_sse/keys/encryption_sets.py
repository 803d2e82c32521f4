"""The life of disk encryption sets and of their identities in a key vault."""

from __future__ import annotations

import contextlib
import logging
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from virt_sse.config import Config
from virt_sse.errors import (
    ConfigError,
    EncryptionSetInUseError,
    InvalidValueError,
    PolicyError,
    PrincipalNotFoundError,
    VirtSseError,
)
from virt_sse.keys.host import Host
from virt_sse.keys.rewrap import DekProof, KeyRotation, RewrapReport
from virt_sse.model.disks import Disk, DiskState, check_name
from virt_sse.model.encryption_sets import EncryptionSet, RevocationAction
from virt_sse.model.keys import KeyId, KeyRef
from virt_sse.model.layers import EncryptionType, HostCaching, Placement
from virt_sse.model.operations import CreateEncryptionSet
from virt_sse.system.files import private_folder
from virt_sse.system.progress import Progress, silent

if TYPE_CHECKING:
    from virt_sse.store.store import Store
    from virt_sse.vault_client.administration import VaultClient

_log = logging.getLogger(__name__)


class EncryptionSets:
    """Creates, changes and deletes disk encryption sets, and rewraps the DEKs of their disks.

    A set is given by name or id; an unknown set raises EncryptionSetNotFoundError.
    """

    def __init__(self, host: Host, rotation: KeyRotation) -> None:
        self._config = host.config
        self._store = host.store
        self._plugins = host.plugins
        self._keys = host.keys
        self._rotation = rotation

    def all(self) -> list[EncryptionSet]:
        """All sets, by name."""
        return self._store.encryption_sets.all()

    def get(self, name: str) -> EncryptionSet:
        """The set of that name or id."""
        return self._store.encryption_sets.get(name)

    def usable(self, name: str) -> EncryptionSet:
        """The set of that name or id, for a disk of this host.

        :raise PolicyError: When the set belongs to another subscription or region than this host.
        """
        encryption_set = self.get(name)
        there = (encryption_set.subscription, encryption_set.region)
        here = (self._config.subscription, self._config.region)
        if there != here:
            raise PolicyError(
                f"set {encryption_set.name!r} is in subscription {there[0]!r}, region {there[1]!r}; "
                f"this host's disks are in {here[0]!r}, {here[1]!r}"
            )
        return encryption_set

    def disks(self, name: str) -> list[Disk]:
        """The disks in a set, by name."""
        return self._store.in_set(self.get(name).id)

    def sizes(self) -> dict[uuid.UUID, int]:
        """Number of disks by set id; sets without disks are left out."""
        return self._store.sizes_of_sets()

    def require_type(self, name: str, encryption_type: EncryptionType | None) -> None:
        """Compare the type of a set with the expected type, if any.

        :raise InvalidValueError: When the set has another type.
        """
        encryption_set = self.get(name)
        if encryption_type not in (None, encryption_set.encryption_type):
            raise InvalidValueError(
                f"set {encryption_set.name!r} has the type {encryption_set.encryption_type.value}"
            )

    def move_disk(self, disk: str, name: str) -> Disk:
        """Move a disk into a set, also while a domain uses the disk.

        :raise PolicyError: When the disk's host caching excludes the set's placement; for a linked clone, and
            for an image with linked clones, whose set is that of the other.
        :raise VirtSseError: By meaning; see :meth:`KeyRotation.move`.
        """
        encryption_set = self.usable(name)
        _refuse_linked(self._store, self._store.get(disk))
        _refuse_cached([self._store.get(disk)], encryption_set.placement or self._config.placement)
        self._rotation.move(self._store.get(disk), encryption_set)
        return self._store.get(disk)

    def use_platform_key(self, disk: str) -> Disk:
        """Return the disk, if under the platform's key already.

        :raise PolicyError: When the disk is in a set: a disk leaves all sets only as a copy.
        """
        found = self._store.get(disk)
        if found.set_id is not None:
            raise PolicyError(
                f"disk {found.name!r} is in an encryption set: customer-managed keys cannot be turned off",
                hint=f"copy the disk: 'virt-sse disk copy {found.name} NEW "
                f"--encryption-type {EncryptionType.PLATFORM_KEY.value}'",
            )
        return found

    def create(
        self,
        name: str,
        *,
        provider: str,
        key: str,
        encryption_type: EncryptionType = EncryptionType.CUSTOMER_KEY,
        automatic_rotation: bool = False,
        revocation: RevocationAction = RevocationAction.SHUTDOWN,
        grace_seconds: int = 60,
        placement: Placement | None = None,
    ) -> EncryptionSet:
        """Create a set and, if its provider needs one, its identity; the identity has no permissions yet.

        :param key: the key in the provider's terms, e.g. a URL. With a version, the set keeps to that
            version.
        :param placement: of the set's disks; ``None``: the host's configured placement.
        :raise InvalidValueError: When name, key, type or grace time is invalid.
        :raise EncryptionSetExistsError: When the name is taken.
        :raise PolicyError: When a rule refuses the set, or the subscription has too many sets in this region.
        :raise KeyDeniedError: When the host's credential may not make identities.
        :raise KeyProviderUnavailableError: When the key vault does not answer.
        """
        check_name(name)
        if encryption_type is EncryptionType.PLATFORM_KEY:
            raise InvalidValueError(f"a disk encryption set cannot have the type {encryption_type.value}")
        self._plugins.encryption_layer(encryption_type)
        encryption_set = EncryptionSet(
            id=uuid.uuid4(),
            name=name,
            key=KeyRef(provider, ""),
            key_version=None,
            encryption_type=encryption_type,
            automatic_rotation=automatic_rotation,
            subscription=self._config.subscription,
            region=self._config.region,
            tenant=None,
            identity=None,
            revocation=revocation,
            grace_seconds=_checked_grace(grace_seconds),
            created=datetime.now(UTC).replace(microsecond=0),
            placement=placement,
        )
        encryption_set = self._with_key(encryption_set, key)
        self._plugins.validate(CreateEncryptionSet(encryption_set))
        limit = self._config.encryption_set_limit
        if limit is None:
            limit = self._plugins.cloud_profile().sets_per_region
        with self._new_identity(encryption_set) as identified:
            self._store.encryption_sets.add(identified, limit=limit)
        return identified

    def update(
        self,
        name: str,
        *,
        key: str | None = None,
        automatic_rotation: bool | None = None,
        revocation: RevocationAction | None = None,
        grace_seconds: int | None = None,
        placement: Placement | None = None,
        progress: Progress = silent,
    ) -> tuple[EncryptionSet, RewrapReport]:
        """Change a set, and rewrap the DEKs of its disks if *key* is given.

        :param placement: applies from the next start of each domain.
        :raise InvalidValueError: When a value is invalid.
        :raise PolicyError: When a disk's host caching excludes *placement*.
        """
        changed = self.get(name)
        if automatic_rotation is not None:
            changed = replace(changed, automatic_rotation=automatic_rotation)
        if revocation is not None:
            changed = replace(changed, revocation=revocation)
        if grace_seconds is not None:
            changed = replace(changed, grace_seconds=_checked_grace(grace_seconds))
        if placement is not None:
            _refuse_cached(self._store.in_set(changed.id), placement)
            changed = replace(changed, placement=placement)
        changed = self._with_key(changed, key) if key is not None else changed
        _check_rotation(changed)
        self._store.encryption_sets.update(changed)
        disks = self._store.in_set(changed.id) if key is not None else []
        return changed, self._rotation.rewrap_disks(disks, progress)

    def wanted_key(self, encryption_set: EncryptionSet) -> KeyId:
        """The version of the set's key that should wrap the DEKs of its disks.

        :raise KeyProviderError: When the provider has no such key or does not answer.
        """
        return self._keys.wrapping_key(encryption_set.key, encryption_set)

    def rotate(self, name: str, *, every_image: bool = False, progress: Progress = silent) -> RewrapReport:
        """Rewrap the DEKs of a set's disks with the wanted key version; continues an interrupted run.

        :param every_image: see :meth:`KeyRotation.rewrap_disks`.
        """
        return self._rotation.rewrap_disks(self.disks(name), progress, every_image=every_image)

    def prove(self, name: str, *, progress: Progress = silent) -> list[DekProof]:
        """Unwrap every stored copy of the DEKs of a set's disks, to find copies under an older key."""
        return self._rotation.prove(self.disks(name), progress)

    def move_to_tenant(self, name: str, tenant: str) -> EncryptionSet:
        """Move a set to another tenant. Its identity is deleted, so the set loses access to its key.

        :raise InvalidValueError: When the set is in that tenant already.
        """
        encryption_set = self.get(name)
        if tenant == encryption_set.tenant:
            raise InvalidValueError(f"set {encryption_set.name!r} is in tenant {tenant!r}")
        self._drop_identity(encryption_set)
        moved = replace(encryption_set, tenant=tenant, identity=None)
        self._store.encryption_sets.update(moved)
        return moved

    def assign_identity(self, name: str) -> EncryptionSet:
        """Create an identity for a set without one, in the tenant of the host's credential.

        :raise InvalidValueError: When the set has an identity, or its provider needs none.
        """
        encryption_set = self.get(name)
        if encryption_set.identity:
            raise InvalidValueError(f"set {encryption_set.name!r} has identity {encryption_set.identity}")
        if not self._plugins.needs_identity(encryption_set.key.provider):
            raise InvalidValueError(f"key provider {encryption_set.key.provider!r} needs no identity")
        with self._new_identity(encryption_set) as identified:
            self._store.encryption_sets.update(identified)
        self._plugins.forget(encryption_set.id)
        return identified

    def delete(self, name: str, *, dry_run: bool = False) -> EncryptionSet:
        """Delete an empty set and its identity.

        :param dry_run: check only.
        :return: the set.
        :raise EncryptionSetInUseError: When a disk is in the set.
        :raise KeyProviderUnavailableError: When the key vault does not answer.
        """
        encryption_set = self.get(name)
        if disks := self._store.in_set(encryption_set.id):
            raise _in_use(encryption_set, disks)
        if dry_run:
            if encryption_set.identity:
                with self._operator() as operator, contextlib.suppress(PrincipalNotFoundError):
                    operator.get_principal(encryption_set.identity)
            return encryption_set
        self._drop_identity(encryption_set)
        self._store.encryption_sets.remove(encryption_set)
        return encryption_set

    def _with_key(self, encryption_set: EncryptionSet, key: str) -> EncryptionSet:
        name, version = self._plugins.parse_key(encryption_set.key.provider, key)
        changed = replace(encryption_set, key=KeyRef(encryption_set.key.provider, name), key_version=version)
        _check_rotation(changed)
        return changed

    @contextlib.contextmanager
    def _new_identity(self, encryption_set: EncryptionSet) -> Iterator[EncryptionSet]:
        """The set with a new identity, deleted if the block fails; unchanged if no identity is needed."""
        if not self._plugins.needs_identity(encryption_set.key.provider):
            yield encryption_set
            return
        path = self._config.identity(encryption_set.id)
        private_folder(path.parent)
        with self._operator() as operator:
            # The set's id fixes the principal's name, so leftovers of a killed command are found and
            # replaced.
            name = f"des-{encryption_set.id}"
            with contextlib.suppress(PrincipalNotFoundError):
                operator.delete_principal(name)
            path.unlink(missing_ok=True)
            credential = operator.new_credential_file(path, name)
            try:
                yield replace(encryption_set, identity=credential.client_id, tenant=credential.tenant)
            except BaseException:
                path.unlink(missing_ok=True)
                with contextlib.suppress(VirtSseError):
                    operator.delete_principal(name)
                raise

    def _drop_identity(self, encryption_set: EncryptionSet) -> None:
        self._plugins.forget(encryption_set.id)
        if encryption_set.identity:
            with self._operator() as operator, contextlib.suppress(PrincipalNotFoundError):
                operator.delete_principal(encryption_set.identity)
        self._config.identity(encryption_set.id).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _operator(self) -> Iterator[VaultClient]:
        path: Path = self._config.operator_credential
        if not path.exists():
            raise ConfigError(
                f"no credential for creating identities ({path})",
                hint="the vault's administrator creates one: virt-sse vault principal create HOST "
                f"--role identity-operator --file {path}",
            )
        from virt_sse.vault_client.administration import VaultClient

        with VaultClient(path) as client:
            yield client


def _in_use(encryption_set: EncryptionSet, disks: Sequence[Disk]) -> EncryptionSetInUseError:
    problem = f"disk {disks[0].name!r} is in disk encryption set {encryption_set.name!r}"
    hint = "first move its disks to another set, or delete them"
    if all(disk.state is DiskState.DELETED for disk in disks):
        problem = f"deleted {problem}"
        hint = "'virt-sse disk recover' recovers its deleted disks, 'virt-sse disk purge' destroys them"
    return EncryptionSetInUseError(problem, hint=hint)


def refuse_moved(disk: Disk, encryption_set: EncryptionSet | None, config: Config) -> None:
    """Refuse a disk under a customer's key of another subscription or region than this host's.

    :param encryption_set: the disk's set.
    :raise PolicyError: When the set is elsewhere: such disks do not move.
    """
    if encryption_set is None:
        return
    if encryption_set.subscription != config.subscription:
        raise PolicyError(
            f"disk {disk.name!r}, under a customer's key, cannot move from subscription "
            f"{encryption_set.subscription!r} to subscription {config.subscription!r}"
        )
    if encryption_set.region != config.region:
        raise PolicyError(
            f"disk {disk.name!r} is in region {encryption_set.region!r}, this host's VMs are in region "
            f"{config.region!r}: a disk, its set and its VM have the same region"
        )


def _refuse_cached(disks: Sequence[Disk], placement: Placement) -> None:
    """Refuse placement in the storage daemon for disks with host caching.

    :raise PolicyError: When one of *disks* has host caching.
    """
    for disk in disks:
        if placement is Placement.STORAGE and disk.caching is not HostCaching.NONE:
            raise PolicyError(
                f"disk {disk.name!r} has host caching {disk.caching.value}, "
                "not supported with placement storage",
                hint="'virt-sse vm update DOMAIN --disk-caching TARGET=None' removes the host cache",
            )


def _refuse_linked(store: Store, disk: Disk) -> None:
    """Refuse to move a linked clone, or an image with linked clones: both are under the key of one set.

    :raise PolicyError: When *disk* is either.
    """
    if disk.is_linked_clone:
        raise PolicyError(
            f"disk {disk.name!r} is a linked clone: its image is under the key of its set",
            hint=f"copy the disk: 'virt-sse disk copy {disk.name} NEW --des SET'",
        )
    if clones := [each for each in store.based_on(disk.id) if each.is_linked_clone]:
        raise PolicyError(
            f"image {disk.name!r} has linked clones: {', '.join(clone.name for clone in clones)}",
            hint="'virt-sse disk reencrypt' makes a clone an independent disk",
        )


def _check_rotation(encryption_set: EncryptionSet) -> None:
    if encryption_set.key_version and encryption_set.automatic_rotation:
        raise InvalidValueError(
            "a set with a fixed key version cannot rotate automatically",
            hint="leave the version out of the key, or switch automatic rotation off",
        )


def _checked_grace(seconds: int) -> int:
    if not 0 <= seconds <= 86_400:
        raise InvalidValueError(f"invalid grace time {seconds} s", hint="0 to 86400 s")
    return seconds

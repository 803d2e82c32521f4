"""Disks in the store: queries and changes, each a transaction."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from datetime import datetime
from pathlib import Path
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from virt_sse.errors import (
    DiskExistsError,
    DiskInUseError,
    DiskNotFoundError,
    DiskStateError,
    EncryptionSetNotFoundError,
    StoreError,
    StoreReadOnlyError,
    StoreUnavailableError,
)
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, taken_hint
from virt_sse.model.envelope import DekEntry
from virt_sse.model.keys import KeyId, KeyRef
from virt_sse.store.certificates import CertificateStore
from virt_sse.store.encryption_sets import EncryptionSetStore
from virt_sse.store.engine import open_engine, reading, writing
from virt_sse.store.hosts import HostStore
from virt_sse.store.image_paths import ImagePaths
from virt_sse.store.protected_domains import ProtectedDomainStore
from virt_sse.store.replacements import ReplacementStore
from virt_sse.store.rows import UNFINISHED_STATES, disks_of
from virt_sse.store.scale_sets import ScaleSetStore
from virt_sse.store.statements import is_storable, next_number, refusing
from virt_sse.store.tables import disks, encryption_sets, wrapped_deks
from virt_sse.store.vms import VmStore


class Store:
    """The index of disks, for concurrent use by several processes and threads.

    :param image_paths: file that gets the paths of new images.
    :raise StoreError: When the database cannot be opened; from every method, when the database fails.
    """

    def __init__(self, url: str, image_paths: ImagePaths | None = None) -> None:
        self._engine = open_engine(url)
        self._image_paths = image_paths
        self.encryption_sets = EncryptionSetStore(self._engine)
        self.vms = VmStore(self._engine)
        self.certificates = CertificateStore(self._engine)
        self.scale_sets = ScaleSetStore(self._engine)
        self.replacements = ReplacementStore(self._engine)
        self.hosts = HostStore(self._engine)
        self.protected_domains = ProtectedDomainStore(self._engine)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def add(self, disk: Disk, *, is_adopted: bool = False) -> None:
        """Add *disk*.

        :param is_adopted: whether the copy below may be missing, or be adopted later.
        :raise DiskExistsError: When the name, path or id is taken.
        :raise DiskStateError: When the copy below was or is being deleted.
        :raise EncryptionSetNotFoundError: When the disk's encryption set was deleted.
        """
        with self._naming_taken(disk), writing(self._engine) as connection:
            _refuse_taken(connection, disk)
            if not is_adopted:
                _check_base(connection, disk)
            connection.execute(
                disks.insert().values(
                    id=disk.id,
                    name=disk.name,
                    path=str(disk.path),
                    format=disk.format.value,
                    size=disk.size,
                    state=disk.state.value,
                    encryption_type=disk.encryption_type.value,
                    created=disk.created.isoformat(),
                    generation=disk.generation,
                    sku=disk.sku.value,
                    encryption_set_id=disk.set_id,
                    caching=disk.caching.value,
                    kind=disk.kind.value,
                    source_id=disk.source_id,
                    point=disk.point,
                    origin_id=disk.origin_id,
                    serial=disk.serial,
                    base_id=disk.base_id,
                    deleted=None,
                    scheduled_purge=None,
                )
            )
            _insert_deks(connection, disk.id, disk.deks)
            _number_path(connection, disk.id)
        if self._image_paths:
            self._image_paths.add(disk.path)

    @contextlib.contextmanager
    def _naming_taken(self, disk: Disk) -> Iterator[None]:
        """Name the cause if a transaction failed because of a concurrent change."""
        try:
            yield
        except (StoreUnavailableError, StoreReadOnlyError):
            raise  # in the former case, this transaction may have added the disk
        except StoreError:
            with reading(self._engine) as connection:
                _refuse_taken(connection, disk)
                _refuse_lost_set(connection, disk)
            raise

    def get(self, name: str) -> Disk:
        """The disk with the given name or id.

        :raise DiskNotFoundError: When no disk has this name or id.
        """
        found = self._select(_is_called(name)) if is_storable(name) else []
        if not found:
            raise DiskNotFoundError(f"no disk {name[:80]!r}", hint="'virt-sse disk list' shows all disks")
        return next((disk for disk in found if disk.name == name), found[0])

    def with_ids(self, ids: Collection[UUID]) -> list[Disk]:
        """The existing disks among *ids*, sorted by name."""
        return self._select(disks.c.id.in_(ids)) if ids else []

    def find_by_path(self, path: Path) -> Disk | None:
        """The disk with its image at *path*, if any."""
        return next(iter(self._select(disks.c.path == str(path))), None)

    def at_paths(self, paths: Collection[Path]) -> list[Disk]:
        """The disks with their images at *paths*, sorted by name."""
        return self._select(disks.c.path.in_(list(map(str, paths)))) if paths else []

    def all(self, kind: DiskKind | None = None) -> list[Disk]:
        """All disks, sorted by name.

        :param kind: those of this kind only.
        """
        return self._select(disks.c.kind == kind.value if kind else sa.true())

    def names(self, kind: DiskKind | None = None, *, is_deleted: bool | None = None) -> list[str]:
        """The names of the disks that :meth:`all` has.

        :param is_deleted: those that are deleted, or are not, only.
        """
        condition = disks.c.kind == kind.value if kind else sa.true()
        if is_deleted is not None:
            deleted = disks.c.state == DiskState.DELETED.value
            condition &= deleted if is_deleted else sa.not_(deleted)
        with reading(self._engine) as connection:
            return sorted(connection.scalars(sa.select(disks.c.name).where(condition)))

    def unfinished(self) -> list[Disk]:
        """The disks with an operation that is in progress or was interrupted; without deleted disks."""
        return self._select(disks.c.state.in_(UNFINISHED_STATES))

    def deleted(self) -> list[Disk]:
        """The deleted disks, which can be recovered, sorted by name."""
        return self._select(disks.c.state == DiskState.DELETED.value)

    def encryption_set_names(self) -> list[str]:
        """The names of all disk encryption sets, sorted."""
        return [each.name for each in self.encryption_sets.all()]

    def under_key(self, key: KeyRef) -> list[Disk]:
        """The disks with a DEK under any version of *key*."""
        return self._select(
            disks.c.id.in_(
                sa.select(wrapped_deks.c.disk_id).where(
                    wrapped_deks.c.key_provider == key.provider, wrapped_deks.c.key_name == key.name
                )
            )
        )

    def in_set(self, set_id: UUID) -> list[Disk]:
        """The disks in an encryption set, sorted by name."""
        return self._select(disks.c.encryption_set_id == set_id)

    def made_of(self, disk_id: UUID) -> list[Disk]:
        """The disks and copies with *disk_id* as their source, sorted by name."""
        return self._select(disks.c.source_id == disk_id)

    def copies_of(self, disk: Disk) -> list[Disk]:
        """All other disks with content of the same origin as *disk*: its copies, and what it is a copy of."""
        origin = disk.origin_id or disk.id
        return self._select(
            sa.and_(sa.or_(disks.c.origin_id == origin, disks.c.id == origin), disks.c.id != disk.id)
        )

    def based_on(self, disk_id: UUID) -> list[Disk]:
        """The incremental copies and linked clones whose images lack what *disk_id* has, sorted by name."""
        return self._select(disks.c.base_id == disk_id)

    def paths_since(self, number: int) -> tuple[int, dict[UUID, Path]]:
        """The paths of images that were added or moved after the change with this *number*.

        Removed disks are not told.

        :param number: -1 for the paths of all images.
        :return: the number of the last of these changes, and the paths by disk.
        """
        columns = (disks.c.id, disks.c.path, disks.c.path_number)
        query = sa.select(*columns).where(disks.c.path_number > number)
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        last = max((row.path_number for row in rows), default=number)
        return last, {row.id: Path(row.path) for row in rows}

    def sizes_of_sets(self) -> dict[UUID, int]:
        """Number of disks by encryption set; sets without disks are left out."""
        column = disks.c.encryption_set_id
        query = sa.select(column, sa.func.count()).group_by(column)
        with reading(self._engine) as connection:
            return {set_id: count for set_id, count in connection.execute(query) if set_id}

    def keys_in_use(self) -> dict[tuple[KeyId, UUID | None], int]:
        """Number of DEKs by KEK version and the encryption set whose identity uses the KEK."""
        own = wrapped_deks.c.position == 0  # see Disk.identity_for
        columns = (
            wrapped_deks.c.key_provider,
            wrapped_deks.c.key_name,
            wrapped_deks.c.key_version,
            sa.case((own, disks.c.encryption_set_id), else_=sa.null()),
        )
        query = sa.select(*columns, sa.func.count()).select_from(wrapped_deks.join(disks))
        with reading(self._engine) as connection:
            return {
                (KeyId(provider, name, version), set_id): count
                for provider, name, version, set_id, count in connection.execute(
                    query.group_by(*columns).order_by(*columns)
                )
            }

    def key_versions_in(self, set_id: UUID) -> set[KeyId]:
        """The KEK versions of the first DEKs of an encryption set's disks; empty for a set without disks."""
        columns = (wrapped_deks.c.key_provider, wrapped_deks.c.key_name, wrapped_deks.c.key_version)
        of_set = sa.and_(wrapped_deks.c.position == 0, disks.c.encryption_set_id == set_id)
        query = sa.select(*columns).select_from(wrapped_deks.join(disks)).where(of_set).distinct()
        with reading(self._engine) as connection:
            return {KeyId(*row) for row in connection.execute(query)}

    def set_state(self, disk_id: UUID, state: DiskState) -> None:
        """Set the state of a disk.

        :raise DiskNotFoundError: When the disk was deleted.
        """
        self._update(disk_id, state=state.value)

    def set_deleted(self, disk_id: UUID, deleted: datetime, scheduled_purge: datetime) -> None:
        """Set the state of a ready disk to ``deleted``.

        :raise DiskStateError: When the disk is not ready any more.
        """
        self._leave(
            disk_id,
            DiskState.READY,
            state=DiskState.DELETED.value,
            deleted=deleted.isoformat(),
            scheduled_purge=scheduled_purge.isoformat(),
        )

    def set_recovered(self, disk_id: UUID) -> None:
        """Set the state of a deleted disk to ``ready``.

        :raise DiskStateError: When the disk was recovered or purged meanwhile.
        """
        self._leave(
            disk_id, DiskState.DELETED, state=DiskState.READY.value, deleted=None, scheduled_purge=None
        )

    def set_received(self, disk_id: UUID) -> None:
        """Set the state of a disk that has received its content to ``ready``.

        :raise DiskStateError: When the disk is not ``receiving`` any more.
        """
        self._leave(disk_id, DiskState.RECEIVING, state=DiskState.READY.value)

    def begin_deletion(self, disk_id: UUID) -> None:
        """Set the state of a disk that no copy is based on to ``deleting``.

        :raise DiskInUseError: When an incremental copy or a linked clone is based on the disk.
        :raise DiskNotFoundError: When the disk was deleted.
        """
        with writing(self._engine) as connection:
            _locked_state(connection, disk_id)
            above = connection.scalar(sa.select(disks.c.name).where(disks.c.base_id == disk_id))
            if above is not None:
                raise DiskInUseError(f"{above!r} is based on it")
            deleting = disks.update().where(disks.c.id == disk_id).values(state=DiskState.DELETING.value)
            if connection.execute(deleting).rowcount != 1:
                raise DiskNotFoundError(f"disk {disk_id} was deleted")

    def set_size(self, disk_id: UUID, size: int) -> None:
        """Set the size of a disk in bytes.

        :raise DiskNotFoundError: When the disk was deleted.
        """
        self._update(disk_id, size=size)

    def set_path(self, disk_id: UUID, path: Path) -> None:
        """Set the path of a moved image.

        :raise DiskNotFoundError: When the disk was deleted.
        :raise DiskExistsError: When *path* belongs to another disk.
        """
        if self.find_by_path(path):
            raise DiskExistsError(f"a disk with path {str(path)!r} exists already")
        try:
            with writing(self._engine) as connection:
                _update(connection, disk_id, path=str(path))
                _number_path(connection, disk_id)
        except StoreError as exc:
            if self.find_by_path(path):  # since
                raise DiskExistsError(f"a disk with path {str(path)!r} exists already") from exc
            raise
        if self._image_paths:
            self._image_paths.add(path)

    def replace(self, before: Disk, after: Disk) -> bool:
        """Replace DEKs, encryption type, encryption set and generation of a disk with the values of *after*.

        Compare-and-swap: if the disk's generation differs from *before*, nothing changes and the result is
        false.

        :raise EncryptionSetNotFoundError: When the set of *after* was deleted.
        """
        with writing(self._engine) as connection:
            with refusing(_lost_set(after)):
                swapped = connection.execute(
                    disks.update()
                    .where(disks.c.id == before.id, disks.c.generation == before.generation)
                    .values(
                        generation=after.generation,
                        encryption_type=after.encryption_type.value,
                        encryption_set_id=after.set_id,
                    )
                )
            if swapped.rowcount != 1:
                return False
            connection.execute(wrapped_deks.delete().where(wrapped_deks.c.disk_id == before.id))
            _insert_deks(connection, after.id, after.deks)
            return True

    def drop_deks(self, disk_id: UUID) -> None:
        """Delete a disk's wrapped DEKs permanently."""
        with writing(self._engine) as connection:
            connection.execute(wrapped_deks.delete().where(wrapped_deks.c.disk_id == disk_id))

    def remove(self, disk_id: UUID) -> None:
        """Delete a disk and its wrapped DEKs permanently. An unknown id is no error."""
        with writing(self._engine) as connection:
            connection.execute(disks.delete().where(disks.c.id == disk_id))

    def _leave(self, disk_id: UUID, before: DiskState, **values: object) -> None:
        """Change a disk whose state is *before*.

        :raise DiskStateError: When the disk is in another state, or gone.
        """
        is_there = sa.and_(disks.c.id == disk_id, disks.c.state == before.value)
        with writing(self._engine) as connection:
            if connection.execute(disks.update().where(is_there).values(**values)).rowcount != 1:
                raise DiskStateError(f"disk {disk_id} is not {before.value} any more")

    def _update(self, disk_id: UUID, **values: object) -> None:
        with writing(self._engine) as connection:
            _update(connection, disk_id, **values)

    def _select(self, condition: sa.ColumnElement[bool]) -> list[Disk]:
        # A single statement, so that a disk and its DEKs are consistent.
        placement = (
            sa.select(encryption_sets.c.placement)
            .where(encryption_sets.c.id == disks.c.encryption_set_id)
            .scalar_subquery()
            .label("placement")
        )
        query = (
            sa.select(disks, wrapped_deks, placement)
            .select_from(disks.outerjoin(wrapped_deks))
            .where(condition)
            .order_by(wrapped_deks.c.position)
        )
        with reading(self._engine) as connection:
            return disks_of(connection.execute(query))


def _update(connection: Connection, disk_id: UUID, **values: object) -> None:
    """Change a disk.

    :raise DiskNotFoundError: When the disk was deleted.
    """
    if connection.execute(disks.update().where(disks.c.id == disk_id).values(**values)).rowcount != 1:
        raise DiskNotFoundError(f"disk {disk_id} was deleted")


def _number_path(connection: Connection, disk_id: UUID) -> None:
    """Number the addition or move of an image, as the last lock of a transaction.

    The next transaction with a number waits for the end of this one: whoever sees a number sees all before.
    """
    _update(connection, disk_id, path_number=next_number(connection, "image-paths"))


def _refuse_taken(connection: Connection, disk: Disk) -> None:
    """Refuse a disk whose name, path or id is taken.

    :raise DiskExistsError: When one is taken.
    """
    for column, value in (("name", disk.name), ("path", str(disk.path)), ("id", disk.id)):
        taken = sa.select(disks.c.name, disks.c.state).where(disks.c[column] == value)
        if row := connection.execute(taken).first():
            raise DiskExistsError(
                f"a disk with {column} {str(value)!r} exists already",
                hint=taken_hint(row.name, DiskState(row.state)),
            )


def _check_base(connection: Connection, disk: Disk) -> None:
    """Check that the copy below *disk*, if there is one, stays.

    :raise DiskStateError: When the copy below is not ready.
    """
    if disk.base_id and _locked_state(connection, disk.base_id) is not DiskState.READY:
        raise DiskStateError(f"the copy below {disk.name!r} is not ready")


def _locked_state(connection: Connection, disk_id: UUID) -> DiskState | None:
    """The state of a disk, unchanged until the end of the transaction; ``None`` without such a disk."""
    state = connection.scalar(sa.select(disks.c.state).where(disks.c.id == disk_id).with_for_update())
    return DiskState(state) if state else None


def _refuse_lost_set(connection: Connection, disk: Disk) -> None:
    """Refuse a disk whose encryption set was deleted meanwhile.

    :raise EncryptionSetNotFoundError: When the set was deleted.
    """
    query = sa.select(encryption_sets.c.name).where(encryption_sets.c.id == disk.set_id)
    if disk.set_id and connection.scalar(query) is None:
        raise _lost_set(disk)


def _lost_set(disk: Disk) -> EncryptionSetNotFoundError:
    return EncryptionSetNotFoundError(f"the disk encryption set of disk {disk.name!r} was deleted")


def _is_called(name: str) -> sa.ColumnElement[bool]:
    """The condition that a disk has the name or id *name*. A name may look like the id of another disk."""
    try:
        return sa.or_(disks.c.name == name, disks.c.id == UUID(name))
    except ValueError:
        return disks.c.name == name


def _insert_deks(connection: Connection, disk_id: UUID, deks: tuple[DekEntry, ...]) -> None:
    for position, entry in enumerate(deks):
        connection.execute(
            wrapped_deks.insert().values(
                disk_id=disk_id,
                position=position,
                slot=entry.slot,
                cipher=str(entry.cipher),
                algorithm=entry.wrapped.algorithm,
                ciphertext=entry.wrapped.ciphertext,
                key_provider=entry.wrapped.key.provider,
                key_name=entry.wrapped.key.name,
                key_version=entry.wrapped.key.version,
            )
        )

"""The part of the store that keeps virtual machines."""

from __future__ import annotations

import json
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, Row

from virt_sse.model.keys import KeyId, KeyRef, WrappedDek
from virt_sse.model.layers import HostCaching
from virt_sse.model.vms import PendingUpdate, Vm, VmProperties
from virt_sse.store.engine import reading, writing
from virt_sse.store.tables import disks, vms


class VmStore:
    """Queries and changes, each one transaction; every method raises StoreError when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def find(self, vm_id: UUID) -> Vm | None:
        """The VM of that domain, if it is known."""
        return next(iter(self._select(vms.c.id == vm_id)), None)

    def all(self) -> list[Vm]:
        """All VMs, by name."""
        return self._select(sa.true())

    def under_key(self, key: KeyRef) -> list[Vm]:
        """The VMs with a DEK under any version of *key*."""
        return self._select(sa.and_(vms.c.tpm_key_provider == key.provider, vms.c.tpm_key_name == key.name))

    def keys_in_use(self) -> dict[KeyId, int]:
        """Each KEK version that DEKs of VMs are under, and how many are."""
        columns = (vms.c.tpm_key_provider, vms.c.tpm_key_name, vms.c.tpm_key_version)
        query = (
            sa.select(*columns, sa.func.count()).where(vms.c.tpm_ciphertext.is_not(None)).group_by(*columns)
        )
        with reading(self._engine) as connection:
            return {KeyId(*key): count for *key, count in connection.execute(query)}

    def put(self, vm: Vm) -> None:
        """Add *vm*, or put it in the place of the one with its id."""
        with writing(self._engine) as connection:
            changed = connection.execute(vms.update().where(vms.c.id == vm.id).values(**_values(vm)))
            if changed.rowcount != 1:
                connection.execute(vms.insert().values(id=vm.id, **_values(vm)))

    def commit(self, vm: Vm) -> Vm:
        """Make what is pending what is; the VM as it is then. Its disks' caching is part of it."""
        pending = vm.pending
        if pending is None:
            return vm
        after = Vm(vm.id, vm.name, vm.host, pending.properties, vm.generation + 1, None, vm.tpm)
        with writing(self._engine) as connection:
            connection.execute(vms.update().where(vms.c.id == vm.id).values(**_values(after)))
            for disk_id, caching in pending.caching.items():
                _set_caching(connection, disk_id, caching)
        return after

    def replace_tpm(self, vm_id: UUID, before: WrappedDek, after: WrappedDek) -> bool:
        """Rewrap the DEK of a VM's TPM. Compare-and-swap: false, and nothing done, unless it still is
        *before*.
        """
        with writing(self._engine) as connection:
            swapped = connection.execute(
                vms.update()
                .where(vms.c.id == vm_id, vms.c.tpm_ciphertext == before.ciphertext)
                .values(**_tpm_values(after))
            )
            return swapped.rowcount == 1

    def remove(self, vm_id: UUID) -> None:
        """Forget a VM, and the wrapped DEK of its TPM, for good. No error when it is not there."""
        with writing(self._engine) as connection:
            connection.execute(vms.delete().where(vms.c.id == vm_id))

    def set_caching(self, disk_id: UUID, caching: HostCaching) -> None:
        """Note what the host is to cache of a disk. No error when there is none."""
        with writing(self._engine) as connection:
            _set_caching(connection, disk_id, caching)

    def _select(self, condition: sa.ColumnElement[bool]) -> list[Vm]:
        query = sa.select(vms).where(condition).order_by(vms.c.name, vms.c.id)
        with reading(self._engine) as connection:
            return [_vm(row) for row in connection.execute(query)]


def _set_caching(connection: Connection, disk_id: UUID, caching: HostCaching) -> None:
    connection.execute(disks.update().where(disks.c.id == disk_id).values(caching=caching.value))


def _values(vm: Vm) -> dict[str, object]:
    return {
        "name": vm.name,
        "host": vm.host,
        "encryption_at_host": vm.properties.encryption_at_host,
        "size": vm.properties.size,
        "temp_disk_size": vm.properties.temp_disk_size,
        "generation": vm.generation,
        "pending": _to_json(vm.pending) if vm.pending else None,
        **_tpm_values(vm.tpm),
    }


def _tpm_values(wrapped: WrappedDek | None) -> dict[str, object]:
    return {
        "tpm_algorithm": wrapped.algorithm if wrapped else None,
        "tpm_ciphertext": wrapped.ciphertext if wrapped else None,
        "tpm_key_provider": wrapped.key.provider if wrapped else None,
        "tpm_key_name": wrapped.key.name if wrapped else None,
        "tpm_key_version": wrapped.key.version if wrapped else None,
    }


def _to_json(pending: PendingUpdate) -> str:
    properties = pending.properties
    return json.dumps(
        {
            "encryption-at-host": properties.encryption_at_host,
            "size": properties.size,
            "temp-disk-size": properties.temp_disk_size,
            "caching": {str(disk_id): caching.value for disk_id, caching in pending.caching.items()},
        }
    )


def _from_json(text: str) -> PendingUpdate:
    document = json.loads(text)
    return PendingUpdate(
        VmProperties(document["encryption-at-host"], document["size"], document["temp-disk-size"]),
        {UUID(disk_id): HostCaching(caching) for disk_id, caching in document["caching"].items()},
    )


def _vm(row: Row[Any]) -> Vm:
    tpm = None
    if row.tpm_ciphertext is not None:
        key = KeyId(row.tpm_key_provider, row.tpm_key_name, row.tpm_key_version)
        tpm = WrappedDek(row.tpm_ciphertext, row.tpm_algorithm, key)
    return Vm(
        id=row.id,
        name=row.name,
        host=row.host,
        properties=VmProperties(row.encryption_at_host, row.size, row.temp_disk_size),
        generation=row.generation,
        pending=_from_json(row.pending) if row.pending else None,
        tpm=tpm,
    )

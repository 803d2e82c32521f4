"""Virtual machines in the store."""

from __future__ import annotations

from operator import attrgetter
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from virt_sse.model.keys import KeyId, KeyRef, WrappedDek
from virt_sse.model.layers import HostCaching
from virt_sse.model.vms import Vm
from virt_sse.store.engine import reading, writing
from virt_sse.store.rows import pending_to_json, vm_of
from virt_sse.store.statements import upsert
from virt_sse.store.tables import disks, vms


class VmStore:
    """Queries and changes, each a transaction. Every method raises StoreError when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def find(self, vm_id: UUID) -> Vm | None:
        """The VM with the given domain UUID, if known."""
        return next(iter(self._select(vms.c.id == vm_id)), None)

    def all(self) -> list[Vm]:
        """All VMs, sorted by name; a damaged pending update is logged and left out."""
        return self._select(sa.true(), among_others=True)

    def under_key(self, key: KeyRef) -> list[Vm]:
        """The VMs with a DEK under any version of *key*; a damaged pending update is left out."""
        under = sa.and_(vms.c.tpm_key_provider == key.provider, vms.c.tpm_key_name == key.name)
        return self._select(under, among_others=True)

    def keys_in_use(self) -> dict[KeyId, int]:
        """Number of VMs' DEKs by KEK version."""
        columns = (vms.c.tpm_key_provider, vms.c.tpm_key_name, vms.c.tpm_key_version)
        query = (
            sa.select(*columns, sa.func.count()).where(vms.c.tpm_ciphertext.is_not(None)).group_by(*columns)
        )
        with reading(self._engine) as connection:
            return {KeyId(*key): count for *key, count in connection.execute(query)}

    def put(self, vm: Vm) -> None:
        """Add *vm*, or replace the VM with its id."""
        with writing(self._engine) as connection:
            upsert(connection, vms, {"id": vm.id}, _values(vm))

    def commit(self, vm: Vm) -> Vm:
        """Apply the pending update, including the caching of disks; return the updated VM."""
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
        """Replace the wrapped DEK of a VM's TPM.

        Compare-and-swap: if the present wrapped DEK is not *before*, nothing changes and the result is false.
        """
        with writing(self._engine) as connection:
            swapped = connection.execute(
                vms.update()
                .where(vms.c.id == vm_id, vms.c.tpm_ciphertext == before.ciphertext)
                .values(**_tpm_values(after))
            )
            return swapped.rowcount == 1

    def remove(self, vm_id: UUID) -> None:
        """Delete a VM and the wrapped DEK of its TPM permanently. An unknown id is no error."""
        with writing(self._engine) as connection:
            connection.execute(vms.delete().where(vms.c.id == vm_id))

    def set_caching(self, disk_id: UUID, caching: HostCaching) -> None:
        """Set the host caching of a disk. An unknown id is no error."""
        with writing(self._engine) as connection:
            _set_caching(connection, disk_id, caching)

    def _select(self, condition: sa.ColumnElement[bool], *, among_others: bool = False) -> list[Vm]:
        """Select VMs.

        :param among_others: the damaged pending update of one VM must not stop work on the other VMs.
        """
        with reading(self._engine) as connection:
            rows = connection.execute(sa.select(vms).where(condition))
            found = [vm_of(row, tolerant=among_others) for row in rows]
        return sorted(found, key=attrgetter("name", "id"))


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
        "pending": pending_to_json(vm.pending) if vm.pending else None,
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

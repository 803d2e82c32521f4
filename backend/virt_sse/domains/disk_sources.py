"""How a domain definition refers to a disk: layers between guest and storage, and the ``<disk>`` element."""

from __future__ import annotations

from virt_sse.config.file import IoErrors
from virt_sse.errors import PolicyError
from virt_sse.keys.host import Host
from virt_sse.libvirt import disk_element
from virt_sse.libvirt.disk_element import Behind, DiskSource
from virt_sse.model.cloud import DriverOptions
from virt_sse.model.disk_bus import DiskBus
from virt_sse.model.disk_kind import DiskKind
from virt_sse.model.disks import Disk, DiskState, check_kind, state_error
from virt_sse.model.layers import GuestNode, HostCaching, LayerChoice, LayerPlan, Placement
from virt_sse.qemu import ceph
from virt_sse.system.block_devices import is_device
from virt_sse.system.files import canonical
from virt_sse.system.rbd_names import is_rbd


class DiskSources:
    """Plans the layers of disks, and describes disks for domain definitions."""

    def __init__(self, host: Host) -> None:
        self._config = host.config
        self._store = host.store_reads
        self._plugins = host.plugins
        self._stages = host.stages

    def placement(self, disk: Disk) -> Placement:
        """The placement of the disk's DEKs from the next start of a domain with the disk.

        The set and the configuration decide. Of a linked clone's image, shared with other guests, the guest's
        QEMU gets no DEK, and not the file.
        """
        return disk.placement or self._config.placement

    def source(self, disk: Disk, placement: Placement | None = None) -> DiskSource:
        """Describe the disk's source for a domain definition.

        :param placement: default: see :meth:`placement`.
        :raise PolicyError: When the disk's caching and placement exclude each other.
        """
        return self.source_of(disk, self.plan(disk, placement))

    def disk_element(
        self,
        name: str,
        *,
        target: str | None = None,
        bus: DiskBus | None = None,
        read_only: bool = False,
        iothread: int | None = None,
    ) -> str:
        """Make the ``<disk>`` element for a disk, given by name or id (libvirt formatdomain).

        :param target: the name in the guest; default: the first name on *bus*.
        :param bus: default: by *target*; virtio without a target.
        :raise DiskNotFoundError: When the store has no such disk.
        :raise DiskStateError: When the disk is deleted.
        :raise InvalidValueError: When *target* is not a valid name of a disk in a guest, or the bus has no
            iothreads for disks.
        """
        disk = self._store.get(name)
        check_kind(disk, DiskKind.DISK)
        if disk.state is DiskState.DELETED:
            raise state_error(disk)
        return disk_element.disk_element(
            self.source(disk),
            target=target or f"{(bus or DiskBus.VIRTIO).prefix}a",
            bus=bus,
            read_only=read_only,
            iothread=iothread,
            options=self.driver_options(disk),
        )

    def driver_options(self, disk: Disk) -> DriverOptions | None:
        """The driver options of the disk's SKU, by the cloud profile.

        :raise PolicyError: When the profile cannot be read.
        """
        return self._plugins.cloud_profile().drivers.get(disk.sku)

    def source_of(self, disk: Disk, plan: LayerPlan) -> DiskSource:
        """As :meth:`source`, by the plan from :meth:`plan`."""
        guest, *below = plan.stages
        slot = guest.slot if isinstance(guest, GuestNode) else None
        behind = None
        if below or slot is None:
            socket = self._stages.guest_socket(disk.id)
            behind = Behind(canonical(socket), self._config.reconnect_seconds)
        in_ceph = is_rbd(disk.path)
        policy = "stop" if self._config.io_errors is IoErrors.PAUSE else "report"
        return DiskSource(
            disk_id=disk.id,
            slot=slot,
            serial=disk.guest_serial,
            driver_type="raw" if slot is None else disk.format.value,
            path=disk.path,
            behind=behind,
            error_policy=policy if behind or in_ceph else None,
            is_device=is_device(disk.path),
            cluster=ceph.cluster() if in_ceph else None,
        )

    def plan(self, disk: Disk, placement: Placement | None = None) -> LayerPlan:
        """Plan the layers and stages between guest and storage for the disk.

        :param placement: default: see :meth:`placement`.
        :raise PolicyError: When the disk's caching or its layer, from a plugin, excludes the placement.
        """
        layer = self._plugins.encryption_layer(disk.encryption_type)
        placement = placement or self.placement(disk)
        plan = layer.plan(LayerChoice(disk.key, disk.deks[-1].cipher, placement, disk.deks[0].cipher))
        in_guest = any(isinstance(stage, GuestNode) for stage in plan.stages)
        if in_guest is not (placement is Placement.GUEST):
            raise PolicyError(f"encryption layer {layer.name!r} has no placement {placement.value}")
        if is_rbd(disk.path) and disk.caching is not HostCaching.NONE:
            raise PolicyError(f"disk {disk.name!r} is in Ceph, and can have no host cache")
        return self._plugins.host_layer().cache(plan, disk.caching)

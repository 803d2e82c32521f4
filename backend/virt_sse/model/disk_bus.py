"""Buses of disks (libvirt formatdomain, ``<target bus>``)."""

from __future__ import annotations

import enum


class DiskBus(enum.Enum):
    """The bus by which a guest sees a disk; the values are libvirt's."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"
    USB = "usb"
    IDE = "ide"

    @property
    def prefix(self) -> str:
        """First letters of the names of the bus's disks."""
        return {DiskBus.VIRTIO: "vd", DiskBus.IDE: "hd"}.get(self, "sd")

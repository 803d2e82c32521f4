"""Block copies in running domains (libvirt ``virDomainBlockCopy``, QEMU's mirror job)."""

from __future__ import annotations

from dataclasses import dataclass

import libvirt

from virt_sse.libvirt import domains
from virt_sse.libvirt.disk_chains import DiskChain

COPY_JOB = "copy"
"""libvirt's name of the job in ``<mirror job='…'>``."""


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """Progress of a block copy in bytes; the end moves as the guest writes."""

    done: int
    end: int

    @property
    def fraction(self) -> float:
        """The completed fraction, from 0.0 to 1.0."""
        return min(self.done / self.end, 1.0) if self.end else 0.0


class BlockCopy:
    """The block copy of a disk in a running domain.

    Methods raise ``libvirt.libvirtError`` when libvirt refuses.

    :param target: the disk's name in the guest.
    """

    def __init__(self, domain: libvirt.virDomain, target: str) -> None:
        self._domain = domain
        self._target = target

    def start(self, destination: str, *, max_rate: int | None) -> None:
        """Start copying into an existing image.

        :param destination: the ``<disk>`` element of the destination.
        :param max_rate: upper bound in bytes/s.
        """
        parameters = {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: max_rate} if max_rate else {}
        flags = libvirt.VIR_DOMAIN_BLOCK_COPY_REUSE_EXT | libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB
        self._domain.blockCopy(self._target, destination, parameters, flags)

    def chain(self) -> DiskChain | None:
        """The disk, its images and the target of a copy; ``None`` if the domain no longer has the disk."""
        for chain in domains.definition(self._domain).disk_chains():
            if chain.target == self._target:
                return chain
        return None

    def progress(self) -> CopyProgress | None:
        """The progress; ``None`` without a job."""
        found = self._domain.blockJobInfo(self._target)
        return CopyProgress(int(found["cur"]), int(found["end"])) if found else None

    def lift_limit(self) -> None:
        """Lift the bound on the job's rate."""
        self._domain.blockJobSetSpeed(self._target, 0)

    def pivot(self) -> None:
        """Make the domain use the destination; returns once done."""
        self._domain.blockJobAbort(self._target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    def abort(self) -> None:
        """End the job; the domain goes on with its disk. Does nothing without a job."""
        if self.progress() is not None:
            self._domain.blockJobAbort(self._target)

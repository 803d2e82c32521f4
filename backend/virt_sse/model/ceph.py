"""The Ceph cluster whose RBD images are places of disks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CephCluster:
    """How virt-sse and guests' QEMU processes reach the cluster.

    :ivar monitors: addresses of monitors, host and port; without brackets.
    :ivar user: CephX user, without ``client.``.
    :ivar keyring: file with the user's key.
    """

    monitors: tuple[tuple[str, int], ...]
    user: str
    keyring: Path

    @property
    def secret_usage(self) -> str:
        """Usage id of libvirt's secret with the user's key."""
        return f"client.{self.user} of virt-sse"

"""Layers: how a disk's data is encrypted between the guest and the storage.

A layer plugin only plans: it says which DEKs a disk needs and which stages its data passes. The host alone
makes keys, runs processes and speaks to QEMU.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from virt_sse.errors import PolicyError
from virt_sse.model.ciphers import Cipher
from virt_sse.model.keys import KeyRef


class EncryptionType(enum.Enum):
    """At-rest encryption of a disk, in the cloud's words."""

    PLATFORM_KEY = "EncryptionAtRestWithPlatformKey"
    CUSTOMER_KEY = "EncryptionAtRestWithCustomerKey"
    PLATFORM_AND_CUSTOMER_KEYS = "EncryptionAtRestWithPlatformAndCustomerKeys"


@dataclass(frozen=True, slots=True)
class DekSpec:
    """A DEK that a layer needs.

    :ivar slot: its name within the disk, e.g. ``service``; part of what the wrapped DEK is bound to.
    :ivar key: the KEK that wraps it.
    :ivar cipher: what the LUKS volume that it unlocks encrypts with.
    """

    slot: str
    key: KeyRef
    cipher: Cipher


class HostCaching(enum.Enum):
    """What of a disk a host caches, in the cloud's words."""

    NONE = "None"
    READ_ONLY = "ReadOnly"
    READ_WRITE = "ReadWrite"


class Stage:
    """A part of the data path between a guest and the storage; a subclass for each kind of stage."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class GuestNode(Stage):
    """Stage: a LUKS node in the guest's own QEMU, wired by libvirt's ``<encryption format='luks'>``."""

    slot: str


@dataclass(frozen=True, slots=True)
class HostCache(Stage):
    """Stage: a cache on the host, below the guest's LUKS node: it holds ciphertext and nothing else."""

    caching: HostCaching


@dataclass(frozen=True, slots=True)
class StorageNode(Stage):
    """Stage: another LUKS node, in a storage daemon of its own, apart from the guest's QEMU."""

    slot: str


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a layer asks of the host.

    :ivar deks: to make; the guest's first, in the order of the LUKS volumes, which lie one in the other.
    :ivar stages: what data passes, from guest to storage.
    :raise PolicyError: When one layer would add nothing to another: same cipher, same mode, same key.
    """

    deks: tuple[DekSpec, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if len({(spec.cipher, spec.key) for spec in self.deks}) < len(self.deks):
            raise PolicyError(
                f"two layers with the same cipher, {self.deks[0].cipher}, under the same key",
                hint="another cipher for the infrastructure layer: 'disks.infrastructure-cipher'",
            )


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """What a layer plans for.

    :ivar key: the disk's own key.
    :ivar infrastructure_cipher: of the layer under the platform's key, where there is one.
    """

    key: KeyRef
    infrastructure_cipher: Cipher


class EncryptionLayer(ABC):
    """Plans the encryption of a disk at rest. Returns data and does no I/O."""

    name: ClassVar[str]
    encryption_types: ClassVar[frozenset[EncryptionType]]

    @abstractmethod
    def plan(self, choice: LayerChoice) -> LayerPlan:
        """The plan for a disk.

        :raise PolicyError: When the choice makes no sense.
        """


class HostLayer(ABC):
    """Plans what a VM with encryption at host has beside its disks' own layers. Does no I/O."""

    name: ClassVar[str]

    @abstractmethod
    def cache(self, plan: LayerPlan, caching: HostCaching) -> LayerPlan:
        """*plan* with a host cache of that kind in it, where it never holds plaintext."""

    @abstractmethod
    def temporary_disk(self) -> LayerPlan:
        """The plan of a VM's temporary disk."""

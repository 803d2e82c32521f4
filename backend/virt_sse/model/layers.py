"""Layers: how a disk's data is encrypted between the guest and the storage.

A layer plugin plans only: which DEKs a disk needs, and which stages its data passes. The host makes keys,
runs processes and speaks to QEMU.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from virt_sse.errors import PolicyError
from virt_sse.model.ciphers import AES_256_XTS, Cipher
from virt_sse.model.keys import KeyRef


class EncryptionType(enum.Enum):
    """At-rest encryption of a disk, by the cloud's names."""

    PLATFORM_KEY = "EncryptionAtRestWithPlatformKey"
    CUSTOMER_KEY = "EncryptionAtRestWithCustomerKey"
    PLATFORM_AND_CUSTOMER_KEYS = "EncryptionAtRestWithPlatformAndCustomerKeys"


@dataclass(frozen=True, slots=True)
class DekSpec:
    """A DEK required by a layer.

    :ivar slot: name of the DEK within the disk, e.g. ``service``; part of the wrapped DEK's context.
    :ivar key: the KEK for wrapping.
    :ivar cipher: cipher of the LUKS volume unlocked by the DEK.
    """

    slot: str
    key: KeyRef
    cipher: Cipher


class Placement(enum.Enum):
    """The process that holds a disk's DEKs.

    ``GUEST``: the guest's own QEMU decrypts the first layer, further layers have a process of their own.
    ``STORAGE``: one process below the guest's QEMU decrypts all layers; the guest's QEMU has no DEK.
    """

    GUEST = "guest"
    STORAGE = "storage"


class HostCaching(enum.Enum):
    """Host caching of a disk, by the cloud's names."""

    NONE = "None"
    READ_ONLY = "ReadOnly"
    READ_WRITE = "ReadWrite"


class Stage:
    """A part of the data path between a guest and the storage; a subclass for each kind of stage."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class GuestNode(Stage):
    """Stage: a LUKS node in the guest's own QEMU, set up by libvirt's ``<encryption format='luks'>``."""

    slot: str


@dataclass(frozen=True, slots=True)
class HostCache(Stage):
    """Stage: a cache on the host, below the first LUKS node: it holds ciphertext only."""

    caching: HostCaching


@dataclass(frozen=True, slots=True)
class StorageNode(Stage):
    """Stage: a LUKS node in a storage daemon, apart from the guest's QEMU.

    One daemon serves adjacent nodes.
    """

    slot: str


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """A layer's requests to the host.

    :ivar deks: DEKs to make, in the order of the nested LUKS volumes: the guest's, innermost, first.
    :ivar stages: stages on the way of data, guest first. The first stage encrypts: a :class:`GuestNode` or,
        if the guest's QEMU gets no DEK, a :class:`StorageNode`.
    :raise PolicyError: When two layers have the same cipher, mode and key: the second would add nothing.
    """

    deks: tuple[DekSpec, ...]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if len({(spec.cipher, spec.key) for spec in self.deks}) < len(self.deks):
            raise PolicyError(
                f"two layers with the same cipher ({self.deks[0].cipher}) and the same key",
                hint="choose a different cipher for the infrastructure layer: 'disks.infrastructure-cipher'",
            )


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """A layer's input for a plan.

    :ivar key: the disk's own key.
    :ivar infrastructure_cipher: cipher of the layer under the platform's key, in plans with such a layer.
    :ivar placement: the process that is to hold the DEKs. DEKs and images do not depend on the placement.
    :ivar cipher: cipher of the guest's layer.
    """

    key: KeyRef
    infrastructure_cipher: Cipher
    placement: Placement = Placement.GUEST
    cipher: Cipher = AES_256_XTS


class EncryptionLayer(ABC):
    """Plans the encryption of a disk at rest. Returns data and does no I/O."""

    name: ClassVar[str]
    encryption_types: ClassVar[frozenset[EncryptionType]]

    @abstractmethod
    def plan(self, choice: LayerChoice) -> LayerPlan:
        """The plan for a disk.

        :raise PolicyError: When the choice is invalid for this layer.
        """


class HostLayer(ABC):
    """Plans encryption at host: host caches and temporary disks. Does no I/O."""

    name: ClassVar[str]

    @abstractmethod
    def cache(self, plan: LayerPlan, caching: HostCaching) -> LayerPlan:
        """*plan* with a host cache added in a place where data is ciphertext.

        :raise PolicyError: When the plan has no such place.
        """

    @abstractmethod
    def temporary_disk(self) -> LayerPlan:
        """The plan of a VM's temporary disk."""

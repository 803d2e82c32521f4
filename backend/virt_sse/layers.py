"""Layers: how a disk's data is encrypted between the guest and the storage.

A layer plugin only plans: it says which DEKs a disk needs and which stages its data passes. The host alone
makes keys, runs processes and speaks to QEMU.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from virt_sse.ciphers import Cipher
from virt_sse.keys import KeyRef


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


@dataclass(frozen=True, slots=True)
class GuestNode:
    """Stage: a LUKS node in the guest's own QEMU, wired by libvirt's ``<encryption format='luks'>``."""

    slot: str


Stage = GuestNode
"""One thing that data passes, guest first."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What a layer asks of the host: DEKs to make, and stages from guest to storage."""

    deks: tuple[DekSpec, ...]
    stages: tuple[Stage, ...]


class EncryptionLayer(ABC):
    """Plans the encryption of a disk. Returns data and does no I/O."""

    name: ClassVar[str]
    encryption_types: ClassVar[frozenset[EncryptionType]]

    @abstractmethod
    def plan(self, key: KeyRef) -> LayerPlan:
        """The plan for a disk whose own key is *key*."""

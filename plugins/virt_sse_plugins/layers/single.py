"""The single layer: LUKS in the guest's own QEMU or in a storage daemon, under the disk's own key."""

from __future__ import annotations

from virt_sse.api import (
    DekSpec,
    EncryptionLayer,
    EncryptionType,
    GuestNode,
    LayerChoice,
    LayerPlan,
    Placement,
    StorageNode,
)


class SingleLayer(EncryptionLayer):
    """One LUKS node, DEK in slot ``service``."""

    name = "single"
    encryption_types = frozenset({EncryptionType.PLATFORM_KEY, EncryptionType.CUSTOMER_KEY})

    def plan(self, choice: LayerChoice) -> LayerPlan:
        node = StorageNode if choice.placement is Placement.STORAGE else GuestNode
        return LayerPlan(deks=(DekSpec("service", choice.key, choice.cipher),), stages=(node("service"),))

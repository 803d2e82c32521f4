"""The double layer: the single layer inside a second LUKS volume under the platform's own key.

The second layer keeps out an attacker with the customer's key, or with an attack on the cipher, the mode or,
if the first layer is in the guest's QEMU, the implementation there; and vice versa.
"""

from __future__ import annotations

from virt_sse.api import (
    PLATFORM_KEY,
    DekSpec,
    EncryptionLayer,
    EncryptionType,
    GuestNode,
    LayerChoice,
    LayerPlan,
    Placement,
    StorageNode,
)


class DoubleLayer(EncryptionLayer):
    """Two LUKS nodes: slot ``service``; below, in a storage daemon, slot ``infrastructure``.

    The first node is in the guest's QEMU or, by placement, in the same storage daemon.
    """

    name = "double"
    encryption_types = frozenset({EncryptionType.PLATFORM_AND_CUSTOMER_KEYS})

    def plan(self, choice: LayerChoice) -> LayerPlan:
        node = StorageNode if choice.placement is Placement.STORAGE else GuestNode
        return LayerPlan(
            deks=(
                DekSpec("service", choice.key, choice.cipher),
                DekSpec("infrastructure", PLATFORM_KEY, choice.infrastructure_cipher),
            ),
            stages=(node("service"), StorageNode("infrastructure")),
        )

"""The double layer: the single layer inside a second LUKS volume under the platform's own key.

The second layer keeps out an attacker with the customer's key, or with an attack on the cipher, the mode or
the implementation in the guest's QEMU; and vice versa.
"""

from __future__ import annotations

from virt_sse.api import (
    AES_256_XTS,
    PLATFORM_KEY,
    DekSpec,
    EncryptionLayer,
    EncryptionType,
    GuestNode,
    LayerChoice,
    LayerPlan,
    StorageNode,
)


class DoubleLayer(EncryptionLayer):
    """Two LUKS nodes: aes-256-xts in the guest's QEMU, slot ``service``; below, slot ``infrastructure``."""

    name = "double"
    encryption_types = frozenset({EncryptionType.PLATFORM_AND_CUSTOMER_KEYS})

    def plan(self, choice: LayerChoice) -> LayerPlan:
        return LayerPlan(
            deks=(
                DekSpec("service", choice.key, AES_256_XTS),
                DekSpec("infrastructure", PLATFORM_KEY, choice.infrastructure_cipher),
            ),
            stages=(GuestNode("service"), StorageNode("infrastructure")),
        )

"""The double layer: what the single one does, within a second LUKS volume under the platform's own key.

An attacker who has the customer's key, or has found a flaw in one cipher or mode or in its implementation in
the guest's QEMU, is still kept out by the other layer.
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
    """aes-256-xts in the guest's QEMU, slot ``service``; below it another, slot ``infrastructure``."""

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

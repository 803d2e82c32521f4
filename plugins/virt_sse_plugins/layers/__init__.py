"""The encryption layers that come with virt-sse."""

from __future__ import annotations

from virt_sse.hookspecs import RegisterEncryptionLayer, hookimpl
from virt_sse.layers import EncryptionLayer


def _single() -> type[EncryptionLayer]:
    from virt_sse_plugins.layers.single import SingleLayer

    return SingleLayer


@hookimpl
def virt_sse_register_encryption_layers(register: RegisterEncryptionLayer) -> None:
    register("single", _single)

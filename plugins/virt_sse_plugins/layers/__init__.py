"""Built-in encryption layers of virt-sse."""

from __future__ import annotations

from virt_sse.api import EncryptionLayer, HostLayer, RegisterEncryptionLayer, hookimpl


def _single() -> type[EncryptionLayer]:
    from virt_sse_plugins.layers.single import SingleLayer

    return SingleLayer


def _double() -> type[EncryptionLayer]:
    from virt_sse_plugins.layers.double import DoubleLayer

    return DoubleLayer


def _at_host() -> type[HostLayer]:
    from virt_sse_plugins.layers.at_host import AtHostLayer

    return AtHostLayer


@hookimpl
def virt_sse_register_encryption_layers(register: RegisterEncryptionLayer) -> None:
    register("single", _single)
    register("double", _double)
    register("at-host", _at_host)

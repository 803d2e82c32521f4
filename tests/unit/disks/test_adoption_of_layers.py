"""An envelope whose layers are not those of its encryption type is not adopted."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support import images
from virt_sse.backend import Backend
from virt_sse.errors import EnvelopeError
from virt_sse.model.ciphers import AES_256_CBC
from virt_sse.model.disks import NewDisk
from virt_sse.model.envelope import Envelope
from virt_sse.model.layers import EncryptionType
from virt_sse.qemu import envelope_slots, image_file

M = 1 << 20
LAYERS = "layers in the envelope"


def _with_type(encryption_type: EncryptionType) -> Callable[[Envelope], Envelope]:
    return lambda envelope: dataclasses.replace(envelope, encryption_type=encryption_type)


def _with_two_slots(envelope: Envelope) -> Envelope:
    (entry,) = envelope.deks
    return dataclasses.replace(envelope, deks=(entry, dataclasses.replace(entry, slot="infrastructure")))


def _with_slot_of_the_outer_layer(envelope: Envelope) -> Envelope:
    (entry,) = envelope.deks
    return dataclasses.replace(envelope, deks=(dataclasses.replace(entry, slot="infrastructure"),))


def _with_cipher_of_the_outer_layer(envelope: Envelope) -> Envelope:
    (entry,) = envelope.deks
    return dataclasses.replace(envelope, deks=(dataclasses.replace(entry, cipher=AES_256_CBC),))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            _with_type(EncryptionType.PLATFORM_AND_CUSTOMER_KEYS), LAYERS, id="double with one slot"
        ),
        pytest.param(_with_two_slots, LAYERS, id="single with two slots"),
        pytest.param(_with_slot_of_the_outer_layer, LAYERS, id="foreign slot"),
        pytest.param(_with_cipher_of_the_outer_layer, "but the LUKS header has", id="foreign cipher"),
    ],
)
def test_an_envelope_with_other_layers_than_its_type_is_not_adopted(
    root: Path, backend: Backend, change: Callable[[Envelope], Envelope], message: str
) -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")
    disk = backend.disks.create(NewDisk(name="disk", size=M))
    backend.host.store.remove(disk.id)
    with image_file.opened(disk.path, os.O_RDWR) as descriptor:
        envelope_slots.write(descriptor, disk.format, change(disk.envelope))
    with pytest.raises(EnvelopeError, match=message):
        backend.disks.adopt(disk.path, trust=True)
    assert backend.disks.all() == []
    with image_file.opened(disk.path, os.O_RDWR) as descriptor:
        envelope_slots.write(descriptor, disk.format, disk.envelope)
    assert backend.disks.adopt(disk.path, trust=True).deks == disk.deks

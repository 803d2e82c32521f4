from __future__ import annotations

import pytest

from virt_sse.errors import PolicyError
from virt_sse.model.ciphers import AES_256_CBC, AES_256_XTS
from virt_sse.model.disks import PLATFORM_KEY
from virt_sse.model.keys import KeyRef
from virt_sse.model.layers import (
    EncryptionLayer,
    GuestNode,
    HostCache,
    HostCaching,
    LayerChoice,
    Placement,
    StorageNode,
)
from virt_sse_plugins.layers.at_host import AtHostLayer
from virt_sse_plugins.layers.double import DoubleLayer
from virt_sse_plugins.layers.single import SingleLayer

KEY = KeyRef("customer-managed", "https://vault/keys/k")


def choice(placement: Placement) -> LayerChoice:
    return LayerChoice(KEY, AES_256_CBC, placement)


def test_the_placement_decides_the_process_of_each_layer() -> None:
    single, double = SingleLayer(), DoubleLayer()
    assert single.plan(choice(Placement.GUEST)).stages == (GuestNode("service"),)
    assert single.plan(choice(Placement.STORAGE)).stages == (StorageNode("service"),)
    below = StorageNode("infrastructure")
    assert double.plan(choice(Placement.GUEST)).stages == (GuestNode("service"), below)
    assert double.plan(choice(Placement.STORAGE)).stages == (StorageNode("service"), below)


@pytest.mark.parametrize("layer", [SingleLayer(), DoubleLayer()])
def test_deks_do_not_depend_on_the_placement(layer: EncryptionLayer) -> None:
    assert layer.plan(choice(Placement.GUEST)).deks == layer.plan(choice(Placement.STORAGE)).deks


def test_two_equal_layers_are_refused_in_either_placement() -> None:
    for placement in Placement:
        with pytest.raises(PolicyError, match="two layers with the same cipher"):
            DoubleLayer().plan(LayerChoice(PLATFORM_KEY, AES_256_XTS, placement))


@pytest.mark.parametrize("layer", [SingleLayer(), DoubleLayer()])
@pytest.mark.parametrize("caching", [HostCaching.READ_ONLY, HostCaching.READ_WRITE])
def test_a_host_cache_above_all_encryption_is_refused(layer: EncryptionLayer, caching: HostCaching) -> None:
    at_host = AtHostLayer()
    in_guest = layer.plan(choice(Placement.GUEST))
    cached = at_host.cache(in_guest, caching)
    assert cached.stages == (*in_guest.stages, HostCache(caching))
    below = layer.plan(choice(Placement.STORAGE))
    with pytest.raises(PolicyError, match="no host caching with placement storage"):
        at_host.cache(below, caching)
    assert at_host.cache(below, HostCaching.NONE) == below

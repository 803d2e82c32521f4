from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import images
from virt_sse.backend import Backend
from virt_sse.errors import PolicyError
from virt_sse.host.setup import initialise
from virt_sse.model.ciphers import AES_256_XTS
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.encryption_sets import EncryptionSet
from virt_sse.model.layers import (
    DekSpec,
    EncryptionLayer,
    EncryptionType,
    GuestNode,
    HostCaching,
    LayerChoice,
    LayerPlan,
    Placement,
)
from virt_sse.plugins import PluginHost
from virt_sse.store.reader import StoreReader

GUEST, STORAGE = Placement
M = 1 << 20


@pytest.fixture(params=list(Placement))
def configured(request: pytest.FixtureRequest) -> Placement:
    placement: Placement = request.param
    return placement


@pytest.fixture
def backend(root: Path, configured: Placement) -> Iterator[Backend]:
    images.require("qemu-img", "cryptsetup")
    path = root / "etc/virt-sse/config.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'[disks]\nplacement = "{configured.value}"\n')
    with Backend.open(root) as backend:
        initialise(backend.host)
        yield backend


def new_set(backend: Backend, placement: Placement | None) -> EncryptionSet:
    return backend.sets.create(
        f"set-{placement.value if placement else 'default'}",
        provider=PLATFORM_KEY.provider,
        key=PLATFORM_KEY.name,
        encryption_type=EncryptionType.CUSTOMER_KEY,
        placement=placement,
    )


def new_disk(backend: Backend, encryption_set: EncryptionSet | None = None) -> Disk:
    name = encryption_set.name if encryption_set else "platform"
    return backend.disks.create(
        NewDisk(name=name, size=M, encryption_set=encryption_set.name if encryption_set else None)
    )


def test_the_set_decides_else_the_configuration(backend: Backend, configured: Placement) -> None:
    disks = [new_disk(backend, new_set(backend, placement)) for placement in (GUEST, STORAGE, None)]
    disks.append(new_disk(backend))
    wanted = [GUEST, STORAGE, configured, configured]
    assert [backend.domains.placement(disk) for disk in disks] == wanted
    assert [disk.placement for disk in disks] == [GUEST, STORAGE, None, None]
    reader = StoreReader.of(backend.host.config.store_url)
    assert reader
    assert reader.all() == backend.host.store.all()
    for disk, placement in zip(disks, wanted, strict=True):
        source = backend.domains.source(disk)
        socket = backend.host.stages.guest_socket(disk.id)
        if placement is STORAGE:
            assert (source.slot, source.driver_type, source.place) == (None, "raw", socket)
            assert (source.error_policy, source.use("vda").secret) == ("stop", None)
        else:
            assert (source.slot, source.driver_type, source.place) == ("service", "qcow2", disk.path)


def test_an_update_and_a_move_change_the_placement_and_not_the_image(backend: Backend) -> None:
    disk = new_disk(backend, new_set(backend, GUEST))
    content = disk.path.read_bytes()
    changed, _ = backend.sets.update("set-guest", placement=STORAGE)
    assert changed.placement is STORAGE
    now = backend.disks.get(disk.name)
    assert (now.placement, now.envelope, disk.path.read_bytes()) == (STORAGE, disk.envelope, content)
    backend.sets.update("set-guest", grace_seconds=1)
    assert backend.disks.get(disk.name).placement is STORAGE, "only what was named changes"
    backend.sets.update("set-guest", placement=GUEST)
    assert backend.sets.move_disk(disk.name, new_set(backend, STORAGE).name).placement is STORAGE


def test_a_cached_disk_is_not_placed_above_its_cache(backend: Backend, configured: Placement) -> None:
    new_set(backend, STORAGE)
    disk = new_disk(backend, new_set(backend, GUEST))
    backend.host.store.vms.set_caching(disk.id, HostCaching.READ_ONLY)
    message = "host caching ReadOnly, not supported with placement storage"
    with pytest.raises(PolicyError, match=message):
        backend.sets.update("set-guest", placement=STORAGE)
    with pytest.raises(PolicyError, match=message):
        backend.sets.move_disk(disk.name, "set-storage")
    assert backend.disks.get(disk.name).placement is GUEST
    with pytest.raises(PolicyError, match="no host caching with placement storage"):
        backend.domains.plan(backend.disks.get(disk.name), STORAGE)
    platform = new_disk(backend)
    backend.host.store.vms.set_caching(platform.id, HostCaching.READ_ONLY)
    if configured is STORAGE:
        with pytest.raises(PolicyError, match="no host caching with placement storage"):
            backend.domains.source(backend.disks.get(platform.name))


class InGuestOnly(EncryptionLayer):
    """A layer of a plugin that knows no placement."""

    name = "in-guest-only"
    encryption_types = frozenset({EncryptionType.CUSTOMER_KEY})

    def plan(self, choice: LayerChoice) -> LayerPlan:
        return LayerPlan(deks=(DekSpec("service", choice.key, AES_256_XTS),), stages=(GuestNode("service"),))


def test_a_layer_without_the_placement_is_refused_instead_of_giving_a_dek_to_the_guest(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = new_disk(backend, new_set(backend, STORAGE))
    monkeypatch.setattr(PluginHost, "encryption_layer", lambda *_: InGuestOnly())
    with pytest.raises(PolicyError, match="'in-guest-only' has no placement storage"):
        backend.domains.source(disk)
    assert backend.domains.plan(disk, GUEST).stages == (GuestNode("service"),)

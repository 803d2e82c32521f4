"""Images that are older than the last known, forged, or from elsewhere."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from support import images
from support.command_line import CommandLine
from support.faults import crash_points, dies_at, some
from virt_sse.agent.key_watch import KeyWatch, WatchedKey
from virt_sse.audit.log import AuditLog
from virt_sse.backend import Backend
from virt_sse.errors import ImageError, ImageFormatError, StaleImageError, VirtSseError
from virt_sse.host.setup import initialise
from virt_sse.keys import freshness, image_state_files
from virt_sse.keys.freshness import with_newer_envelope
from virt_sse.model.disk_format import DiskFormat
from virt_sse.model.disks import PLATFORM_KEY, Disk, NewDisk
from virt_sse.model.keys import Dek, DekContext
from virt_sse.model.layers import EncryptionType
from virt_sse.model.seal import SEAL_BYTES, SEAL_OFFSETS, Seal, SealKey
from virt_sse.qemu import envelope_slots, image_file, img, luks, unlocking
from virt_sse.system import files

M = 1 << 20
MODULES = (freshness, image_state_files, envelope_slots, files)


@pytest.fixture(autouse=True)
def _tools() -> None:
    images.require("qemu-img", "qemu-io", "cryptsetup")


@pytest.fixture(params=images.FORMATS)
def disk(backend: Backend, request: pytest.FixtureRequest) -> Disk:
    return backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat(request.param)))


@pytest.fixture
def raw(backend: Backend) -> Disk:
    return backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat.RAW))


def start(backend: Backend) -> None:
    backend.host.freshness.begin_use(backend.disks.get("disk"))


def stop(backend: Backend) -> None:
    disk = backend.disks.get("disk")
    backend.host.freshness.end_use(disk.id, disk.path)


def last_record(backend: Backend) -> dict[str, str | None]:
    (entry,) = AuditLog.of_host(backend.host.config).tail(1)
    return entry.document


def lose_store(root: Path) -> None:
    for file in (root / "var/lib/virt-sse").glob("store.sqlite*"):
        file.unlink()


def lose_states(root: Path) -> None:
    shutil.rmtree(root / "var/lib/virt-sse/image-states")


def uses(disk: Disk, backend: Backend) -> int | None:
    return backend.host.freshness.carried_by(disk.path).uses


def without_seals(disk: Disk) -> None:
    """Make the image look as made by the version before seals."""
    with image_file.opened(disk.path, os.O_RDWR) as descriptor:
        offset, _ = image_file.luks_area(descriptor, disk.format)
        for seal in SEAL_OFFSETS:
            os.pwrite(descriptor, bytes(SEAL_BYTES), offset + seal)


def forge(disk: Disk, **changes: object) -> None:
    """Write an envelope with *changes* as anyone with write access to the image can."""
    with image_file.opened(disk.path, os.O_RDWR) as descriptor:
        changed = dataclasses.replace(disk.envelope, **changes)  # type: ignore[arg-type]
        envelope_slots.write(descriptor, disk.format, changed)


def everywhere(backend: Backend) -> list[Callable[[], object]]:
    """The commands that notice a stale image."""
    return [lambda: start(backend), lambda: backend.disks.check("disk")]


def test_ordinary_use_counts_and_stays_fresh(backend: Backend, disk: Disk) -> None:
    assert uses(disk, backend) == 1
    start(backend)
    stop(backend)
    assert uses(disk, backend) == 3
    backend.disks.check("disk")
    backend.keys.rotate(PLATFORM_KEY)
    backend.disks.resize("disk", 2 * M)
    backend.disks.check("disk")
    start(backend)
    assert uses(disk, backend) == 5
    assert backend.disks.get("disk").envelope == backend.host.freshness.carried_by(disk.path).envelope


@pytest.mark.parametrize("event", [start, stop, lambda backend: backend.keys.rotate(PLATFORM_KEY)])
def test_an_image_from_before_an_event_is_refused_until_trusted(
    backend: Backend, disk: Disk, event: Callable[[Backend], object], virt_sse: CommandLine
) -> None:
    older = disk.path.read_bytes()
    event(backend)
    disk.path.write_bytes(older)
    for command in everywhere(backend):
        with pytest.raises(StaleImageError, match="an older copy") as caught:
            command()
        assert "virt-sse disk trust disk" in str(caught.value.hint)
    virt_sse("disk", "trust", "disk")
    record = last_record(backend)
    assert (record["action"], record["disk"]) == ("trust", str(disk.id))
    assert "older copy" in str(record["reason"])
    backend.disks.check("disk")
    start(backend)


def test_a_header_rebuilt_by_a_holder_of_the_dek_is_refused(backend: Backend, disk: Disk) -> None:
    """The same passphrase, another volume key: an escaped guest knows the DEK, not the host key."""
    (dek,) = backend.host.keys.unwrap_all(disk)
    with image_file.opened(disk.path, os.O_RDWR) as descriptor:
        offset, _ = image_file.luks_area(descriptor, disk.format)
        gap = os.pread(descriptor, luks.FIRST_KEYSLOT - luks.HEADER_END, offset + luks.HEADER_END)
        os.pwrite(descriptor, luks.make_header(disk.deks[0].cipher, dek), offset)
        os.pwrite(descriptor, gap, offset + luks.HEADER_END)
    img.check_unlocks(disk.path, disk.format, [dek])
    for command in everywhere(backend):
        with pytest.raises(StaleImageError, match="LUKS header was changed"):
            command()


def test_a_rebuilt_inner_header_is_refused(backend: Backend, tmp_path: Path) -> None:
    kind = EncryptionType.PLATFORM_AND_CUSTOMER_KEYS
    backend.sets.create("double", provider="platform-managed", key="default", encryption_type=kind)
    disk = backend.disks.create(NewDisk(name="disk", size=M, format=DiskFormat.RAW, encryption_set="double"))
    inner, outer = backend.host.keys.unwrap_all(disk)
    backend.disks.check("disk")
    rebuilt = tmp_path / "header"
    header = luks.make_header(disk.deks[0].cipher, inner)
    rebuilt.write_bytes(header)
    image = images.KeyedImage(disk.path, "raw", outer.passphrase)
    assert image.io(f"write -s {rebuilt} 0 {len(header)}").returncode == 0
    img.check_unlocks(disk.path, disk.format, [inner, outer])
    start(backend)
    with pytest.raises(StaleImageError, match="header of the inner layer"):
        backend.host.freshness.check_inner(disk, unlocking.validate(disk.path, disk.format, [outer]))
    with pytest.raises(StaleImageError, match="header of the inner layer"):
        backend.disks.check("disk")
    backend.disks.trust("disk")
    backend.disks.check("disk")


def test_removed_seals_and_a_wiped_envelope_are_refused(backend: Backend, raw: Disk) -> None:
    without_seals(raw)
    for command in everywhere(backend):
        with pytest.raises(StaleImageError, match="no valid seal"):
            command()
    with raw.path.open("r+b") as file:
        file.seek(luks.HEADER_END)
        file.write(bytes(luks.FIRST_KEYSLOT - luks.HEADER_END))
    for command in everywhere(backend):
        with pytest.raises(StaleImageError, match="no envelope"):
            command()


def test_a_rotation_does_not_make_a_stale_image_fresh(backend: Backend, raw: Disk) -> None:
    older = raw.path.read_bytes()
    start(backend)
    raw.path.write_bytes(older)
    _, report = backend.keys.rotate(PLATFORM_KEY)
    assert "an older copy" in report.failed["disk"]
    for command in everywhere(backend):
        with pytest.raises(StaleImageError):
            command()


def test_a_warning_is_a_choice(
    root: Path, backend: Backend, raw: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    older = raw.path.read_bytes()
    start(backend)
    raw.path.write_bytes(older)
    (root / "etc/virt-sse/config.toml").write_text("[host]\nstale-images = 'warn'\n")
    with Backend.open(root) as lenient:
        for _ in range(2):
            caplog.clear()
            start(lenient)
            assert "an older copy" in caplog.text
    assert raw.path.read_bytes() == older, "each start warns until the image is trusted"


def test_disks_from_before_are_taken_over(root: Path, backend: Backend, disk: Disk) -> None:
    without_seals(disk)
    lose_states(root)
    backend.disks.check("disk")
    older = disk.path.read_bytes()
    start(backend)
    assert uses(disk, backend) == 1
    disk.path.write_bytes(older)
    with pytest.raises(StaleImageError):
        start(backend)


def test_a_rotation_seals_disks_from_before(root: Path, backend: Backend, raw: Disk) -> None:
    without_seals(raw)
    lose_states(root)
    backend.keys.rotate(PLATFORM_KEY)
    assert uses(raw, backend) == 1
    start(backend)
    backend.disks.check("disk")


def test_a_changed_envelope_from_before_is_not_taken_over(root: Path, backend: Backend, raw: Disk) -> None:
    lose_states(root)
    forge(raw, generation=7)
    with pytest.raises(StaleImageError, match="no valid seal"):
        start(backend)


def test_a_lost_store_needs_no_trust_and_does_not_hide_an_older_image(root: Path) -> None:
    with Backend.open(root) as backend:
        initialise(backend.host)
        disk = backend.disks.create(NewDisk(name="disk", size=M))
        older = disk.path.read_bytes()
        start(backend)
        newest = disk.path.read_bytes()
    lose_store(root)
    with Backend.open(root) as again:
        disk.path.write_bytes(older)
        with pytest.raises(StaleImageError, match="older than the last known") as caught:
            again.disks.adopt(disk.path)
        assert "--trust" in str(caught.value.hint)
        disk.path.write_bytes(newest)
        assert again.disks.adopt(disk.path) == disk
        start(again)


def test_adoption_of_a_forged_disk_is_refused(root: Path, backend: Backend, raw: Disk) -> None:
    """A public key suffices to wrap a DEK; the attacker's image opens with the attacker's DEK."""
    dek = Dek.generate()
    key = backend.host.keys.current_key(PLATFORM_KEY)
    wrapped = backend.host.keys.wrap(dek, key, context=DekContext(raw.id, "service"))
    with image_file.opened(raw.path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, luks.make_header(raw.deks[0].cipher, dek), 0)
    forge(raw, deks=(dataclasses.replace(raw.deks[0], wrapped=wrapped),))
    backend.host.store.remove(raw.id)
    with pytest.raises(StaleImageError, match="no seal of this host"):
        backend.disks.adopt(raw.path)
    assert backend.disks.all() == []


def test_a_trusted_adoption_is_in_the_audit_log(
    root: Path, backend: Backend, raw: Disk, virt_sse: CommandLine
) -> None:
    without_seals(raw)
    backend.host.store.remove(raw.id)
    lose_states(root)
    assert "no seal of this host" in virt_sse.refuses("disk", "adopt", raw.path)
    virt_sse("disk", "adopt", raw.path, "--trust")
    record = last_record(backend)
    assert (record["action"], record["result"], record["disk"]) == ("trust", "allowed", str(raw.id))
    assert str(raw.path) in str(record["reason"])
    start(backend)
    backend.disks.check("disk")


def test_trust_needs_an_image_that_opens_with_the_dek(backend: Backend, raw: Disk) -> None:
    with image_file.opened(raw.path, os.O_RDWR) as descriptor:
        os.pwrite(descriptor, luks.make_header(raw.deks[0].cipher, Dek.generate()), 0)
    with pytest.raises(ImageFormatError, match="does not open with its DEK"):
        backend.disks.trust("disk")
    other = backend.disks.create(NewDisk(name="other", size=M, format=DiskFormat.RAW))
    shutil.copy(other.path, raw.path)
    with pytest.raises(ImageError):
        backend.disks.trust("disk")


def test_hosts_with_the_same_host_key_take_each_others_newer_images(
    root: Path, backend: Backend, raw: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(root / "var/lib/virt-sse", twin / "var/lib/virt-sse")
    with Backend.open(twin) as other:
        older = raw.path.read_bytes()
        start(backend)
        start(other)
        backend.disks.check("disk")
        start(backend)
        raw.path.write_bytes(older)
        for host in (backend, other):
            with pytest.raises(StaleImageError):
                start(host)


TAKING = {
    "start": lambda host, disk: with_newer_envelope(
        host.host.opened_store, disk, host.host.freshness.begin_use(disk)
    ),
    "check": lambda host, _: host.disks.check("disk"),
    "trust": lambda host, _: host.disks.trust("disk"),
    "resize": lambda host, _: host.disks.resize("disk", M),
    "rotate": lambda host, _: host.keys.rewrap(PLATFORM_KEY),
    "export": lambda host, disk: host.transfer.export("disk", disk.path.with_name("plain")),
    "agent": lambda host, disk: KeyWatch(
        host, poll_seconds=1, probe_seconds=1, changed=lambda: None
    )._take_newer_envelopes(WatchedKey(disk.deks[0].wrapped.key, None)),
}


@pytest.mark.parametrize("name", TAKING)
def test_an_envelope_rotated_by_another_host_with_the_key_is_taken(
    root: Path, backend: Backend, raw: Disk, tmp_path: Path, name: str
) -> None:
    state, twin = root / "var/lib/virt-sse", tmp_path / "twin"
    shutil.copytree(state, twin / "var/lib/virt-sse")
    backend.keys.rotate(PLATFORM_KEY)
    keyring = "platform-managed"
    shutil.copytree(state / keyring, twin / "var/lib/virt-sse" / keyring, dirs_exist_ok=True)
    with Backend.open(twin) as other:
        assert other.disks.get("disk").generation == 1
        TAKING[name](other, other.disks.get("disk"))
        assert other.disks.get("disk") == backend.disks.get("disk")
        other.disks.check("disk")
    start(backend)


def test_another_host_key_needs_trust(backend: Backend, raw: Disk, tmp_path: Path, root: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(root / "var/lib/virt-sse", twin / "var/lib/virt-sse")
    for name in ("host.key", f"image-states/{raw.id}"):
        (twin / "var/lib/virt-sse" / name).unlink()
    with Backend.open(twin) as other:
        with pytest.raises(StaleImageError, match="with the host key of another host"):
            start(other)
        other.disks.trust("disk")
        start(other)
    with pytest.raises(StaleImageError, match="with the host key of another host"):
        start(backend)


@pytest.mark.slow
@pytest.mark.parametrize("event", [start, stop, lambda backend: backend.keys.rotate(PLATFORM_KEY)])
def test_a_kill_at_any_moment_leaves_a_disk_that_starts(
    root: Path, backend: Backend, raw: Disk, event: Callable[[Backend], object]
) -> None:
    def act() -> None:
        with Backend.open(root) as again:
            event(again)

    backend.close()
    for point in some(crash_points(MODULES, act), 12):
        assert dies_at(point, MODULES, act)
        with Backend.open(root) as again:
            start(again)
            again.disks.check("disk")
            assert again.disks.get("disk").envelope == again.host.freshness.carried_by(raw.path).envelope


@pytest.mark.slow
def test_an_adoption_that_is_killed_can_be_repeated(root: Path, backend: Backend, raw: Disk) -> None:
    image = raw.path.read_bytes()
    backend.close()

    def forget() -> None:
        raw.path.write_bytes(image)
        with Backend.open(root) as again:
            again.host.store.remove(raw.id)

    def act() -> None:
        with Backend.open(root) as again:
            again.disks.adopt(raw.path, trust=True)

    forget()
    for point in some(crash_points(MODULES, act), 8):
        forget()
        assert dies_at(point, MODULES, act)
        with Backend.open(root) as again:
            if not again.disks.all():
                again.disks.adopt(raw.path, trust=True)
            start(again)
            again.disks.check("disk")


def test_the_host_key_is_private_made_once_and_not_printed(root: Path, backend: Backend) -> None:
    path = root / "var/lib/virt-sse/host.key"
    content = path.read_bytes()
    assert (len(content), images.mode(path)) == (32, 0o600)
    key = backend.host.freshness.key
    assert key.material.hex() not in repr(key)
    assert content not in (key.material, key.id)
    assert not backend.host.freshness.host_key.provision()
    path.chmod(0o640)
    with Backend.open(root) as again, pytest.raises(VirtSseError, match="open to other users"):
        _ = again.host.freshness.key
    path.chmod(0o600)
    path.write_bytes(content[:31])
    with Backend.open(root) as again, pytest.raises(VirtSseError, match="31 bytes instead of 32"):
        _ = again.host.freshness.key


def test_the_seals_bytes_are_for_ever() -> None:
    """The host key of 32 zero bytes; computed with an independent HKDF and HMAC."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    key = SealKey.of_host_key(bytes(32))
    assert key.material == HKDF(SHA256(), 32, None, b"virt-sse envelope seal v1").derive(bytes(32))
    assert key.id == HKDF(SHA256(), 32, None, b"virt-sse host key id v1").derive(bytes(32))[:8]
    seal = key.seal(b"content", bytes(32), 7)
    assert len(seal.encode()) == SEAL_BYTES
    assert Seal.decode(seal.encode()) == seal
    assert key.verifies(seal, b"content", bytes(32))
    for changed in (Seal(8, seal.key_id, seal.mac), Seal(7, seal.key_id, bytes(32))):
        assert not key.verifies(changed, b"content", bytes(32))
    assert not key.verifies(seal, b"contenT", bytes(32))
    assert not key.verifies(seal, b"content", bytes(31) + b"\1")
    assert Seal.decode(bytes(SEAL_BYTES)) is None

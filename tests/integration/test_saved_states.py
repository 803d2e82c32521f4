"""Encrypted saved states of running guests: vm save and vm restore."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import libvirt
import pytest

from support.agent_site import CustomerSite
from support.faults import no_file_beyond
from support.forking import run_forked
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.domains.saved_states import SavedStates
from virt_sse.domains.settings import VmChanges
from virt_sse.domains.state_records import Phase, state_records
from virt_sse.errors import ImageError, KeyDisabledError, VmStateError
from virt_sse.lab.guests import Guest
from virt_sse.libvirt import memory_image
from virt_sse.model.encryption_sets import RevocationAction

IN_MEMORY = b"SeaBIOS (version"


def state_of(site: CustomerSite, guest: Guest) -> int:
    with contextlib.closing(site.host.connect()) as connection:
        return int(connection.lookupByName(guest.name).state()[0])


def uuid_of(site: CustomerSite, guest: Guest) -> UUID:
    with contextlib.closing(site.host.connect()) as connection:
        return UUID(bytes=connection.lookupByName(guest.name).UUID())


@pytest.fixture
def guest(site: CustomerSite) -> Guest:
    made, _ = site.guest(site.new_set(action=RevocationAction.NONE).name)
    made.start()
    return made


@pytest.fixture
def file(guest: Guest, site: CustomerSite) -> Path:
    folder = site.host.directory / "states"
    folder.mkdir(exist_ok=True)
    return folder / guest.name


def test_a_guest_is_saved_encrypted_and_goes_on_once(site: CustomerSite, guest: Guest, file: Path) -> None:
    said = guest.serial
    saved = site.virt_sse("vm", "save", guest.name, file)
    assert "customer-managed" in saved
    assert state_of(site, guest) == libvirt.VIR_DOMAIN_SHUTOFF
    assert IN_MEMORY not in file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600
    assert site.secrets() == []
    (shown,) = [
        line for line in site.virt_sse("vm", "show", guest.name).splitlines() if "saved-state" in line
    ]
    assert "encrypted" in shown
    assert str(file) in shown
    copy = file.with_suffix(".copy")
    copy.write_bytes(file.read_bytes())

    moved = file.rename(file.with_suffix(".moved"))
    site.virt_sse("vm", "restore", moved)
    assert state_of(site, guest) == libvirt.VIR_DOMAIN_RUNNING
    assert not moved.exists()
    assert guest.serial in ("", said), "the guest has booted again"
    with pytest.raises(VmStateError, match="is running"):
        site.backend.saved_states.restore(copy)
    guest.destroy()
    with pytest.raises(VmStateError, match="not the last saved state"):
        site.backend.saved_states.restore(copy)


def test_a_state_is_void_once_the_disks_are_used(site: CustomerSite, guest: Guest, file: Path) -> None:
    site.backend.saved_states.save(guest.name, file)
    with pytest.raises(VmStateError, match="has a saved state in"):
        site.backend.vms.update(guest.name, VmChanges(encryption_at_host=True))
    guest.start()
    guest.destroy()
    with pytest.raises(VmStateError, match="not the last saved state"):
        site.backend.saved_states.restore(file)
    assert "saved-state" not in site.virt_sse("vm", "show", guest.name)


def test_a_revoked_key_refuses_save_and_restore(site: CustomerSite, guest: Guest, file: Path) -> None:
    disk = site.backend.disks.get(guest.name)
    site.disable(disk)
    with pytest.raises(KeyDisabledError):
        site.backend.saved_states.save(guest.name, file)
    assert state_of(site, guest) == libvirt.VIR_DOMAIN_RUNNING
    site.enable(disk)
    site.backend.saved_states.save(guest.name, file)
    site.disable(disk)
    with pytest.raises(KeyDisabledError):
        site.backend.saved_states.restore(file)
    site.enable(disk)
    site.keys.rotate(disk.key.name)
    proven = site.virt_sse("des", "rotate", str(disk.set_id), "--prove", status=1)
    assert f"saved state {file}" in proven
    site.backend.saved_states.restore(file)
    site.virt_sse("des", "rotate", str(disk.set_id), "--prove")
    assert state_of(site, guest) == libvirt.VIR_DOMAIN_RUNNING


def test_without_room_the_guest_runs_on(site: CustomerSite, guest: Guest, file: Path) -> None:
    with no_file_beyond(1 << 19), pytest.raises(ImageError, match="cannot write"):
        site.backend.saved_states.save(guest.name, file)
    assert state_of(site, guest) == libvirt.VIR_DOMAIN_RUNNING
    assert not file.exists()


def test_a_damaged_state_starts_no_guest_and_a_whole_one_still_does(
    site: CustomerSite, guest: Guest, file: Path
) -> None:
    site.backend.saved_states.save(guest.name, file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ImageError, match="damaged or cut off"):
        site.backend.saved_states.restore(file)
    assert state_of(site, guest) == libvirt.VIR_DOMAIN_SHUTOFF
    file.write_bytes(whole)
    site.backend.saved_states.restore(file)
    assert state_of(site, guest) == libvirt.VIR_DOMAIN_RUNNING


def _killed(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_command_loses_neither_guest_nor_state(site: CustomerSite, guest: Guest, file: Path) -> None:
    records, domain_id = state_records(site.backend.host.config), uuid_of(site, guest)

    def dies(place: object, name: str, act: Callable[[Backend], object]) -> None:
        """Run *act* in a process that is killed when it calls *name*."""

        def work() -> None:
            setattr(place, name, _killed)
            with Backend(site.backend.host.config) as backend:
                act(backend)

        assert run_forked(work) == -signal.SIGKILL

    def assert_settled(state: int, *, file_stays: bool) -> None:
        """The agent, as the next command would, has settled what the killed command left."""

        def settled() -> bool:
            record = records.get(domain_id)
            is_settled = record.phase is Phase.SAVED if record else not file_stays
            return is_settled and state_of(site, guest) == state

        wait_until(settled, f"the state is settled, the domain in state {state}")
        assert file.exists() == file_stays

    def save(backend: Backend) -> None:
        backend.saved_states.save(guest.name, file)

    def restore(backend: Backend) -> None:
        backend.saved_states.restore(file)

    for place, name in (
        (memory_image._Receiver, "_replace_fifo"),
        (SavedStates, "_end"),
        (libvirt.virDomain, "destroyFlags"),
    ):
        dies(place, name, save)
        assert_settled(libvirt.VIR_DOMAIN_RUNNING, file_stays=False)

    dies(SavedStates, "_note", save)  # after the end of the domain
    assert_settled(libvirt.VIR_DOMAIN_SHUTOFF, file_stays=True)
    dies(memory_image, "send", restore)
    assert_settled(libvirt.VIR_DOMAIN_SHUTOFF, file_stays=True)
    dies(SavedStates, "_finish_restore", restore)
    assert_settled(libvirt.VIR_DOMAIN_RUNNING, file_stays=False)

    dies(SavedStates, "_note", save)
    guest.start()
    guest.destroy()
    with pytest.raises(VmStateError, match="not the last saved state"):
        site.backend.saved_states.restore(file)

"""What a set chooses for its guests when its key is taken away; silent vaults; keys that move on."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import libvirt

from support.agent_site import CustomerSite, key_of
from support.command_line import PROGRAM
from support.waiting import wait_until
from virt_sse.lab.guests import Guest
from virt_sse.lab.vaults import LabVault
from virt_sse.model.disks import Disk, DiskSku
from virt_sse.model.encryption_sets import RevocationAction
from virt_sse.model.layers import Placement


def test_a_guest_that_ignores_the_power_button_is_ended_after_the_grace_time(site: CustomerSite) -> None:
    guest, disk = site.guest(site.new_set(grace_seconds=3).name)
    guest.start()
    site.wait_until_watched(guest)
    site.disable(disk)
    site.wait_for_event("domain-action", domain=guest.name, action="shutdown")
    began = time.monotonic()
    wait_until(lambda: site.secrets() == [], "libvirt has no secret of ours")
    assert guest.is_active()
    wait_until(lambda: not guest.is_active(), "the guest has ended")
    assert 2 < time.monotonic() - began < 8
    site.wait_for_event("domain-action", domain=guest.name, action="destroy")


def test_a_key_that_comes_back_within_the_grace_time_saves_the_guest(site: CustomerSite) -> None:
    guest, disk = site.guest(site.new_set(grace_seconds=3).name)
    guest.start()
    site.wait_until_watched(guest)
    site.disable(disk)
    site.wait_for_event("domain-action", domain=guest.name, action="shutdown")
    site.enable(disk)
    site.wait_for_event("domain-restored", domain=guest.name)
    wait_until(lambda: len(site.secrets()) == 1, "libvirt has one secret of ours")
    time.sleep(3)
    assert guest.is_active()


def test_a_paused_guest_goes_on_when_the_key_is_back(site: CustomerSite) -> None:
    guest, disk = site.guest(site.new_set(action=RevocationAction.PAUSE).name)
    guest.start()
    site.wait_until_watched(guest)
    site.disable(disk)
    wait_until(lambda: state_of(guest, site) == libvirt.VIR_DOMAIN_PAUSED, "the guest is paused")
    wait_until(lambda: site.secrets() == [], "libvirt has no secret of ours")
    with site.host.connect() as connection:
        connection.lookupByName(guest.name).resume()
    wait_until(lambda: state_of(guest, site) == libvirt.VIR_DOMAIN_PAUSED, "the guest is paused")
    site.agent.kill()
    site.agent.start()  # which has only the domain to tell it who paused it
    site.enable(disk)
    wait_until(lambda: state_of(guest, site) == libvirt.VIR_DOMAIN_RUNNING, "the guest runs")
    wait_until(lambda: len(site.secrets()) == 1, "libvirt has one secret of ours")


def test_a_guest_that_others_paused_stays_paused(site: CustomerSite) -> None:
    guest, disk = site.guest(site.new_set(action=RevocationAction.PAUSE).name)
    guest.start()
    site.wait_until_watched(guest)
    with site.host.connect() as connection:
        connection.lookupByName(guest.name).suspend()
    site.disable(disk)
    site.wait_for_event("domain-revoked", domain=guest.name)
    site.enable(disk)
    site.wait_for_event("domain-restored", domain=guest.name)
    time.sleep(1)
    assert state_of(guest, site) == libvirt.VIR_DOMAIN_PAUSED


def test_a_guest_without_a_key_of_its_own_loses_its_data_even_without_libvirt(site: CustomerSite) -> None:
    encryption_set = site.new_set(placement=Placement.STORAGE, action=RevocationAction.DESTROY)
    guest, disk = site.guest(encryption_set.name)
    guest.start()
    assert site.secrets() == []
    site.wait_until_watched(guest)
    stages = site.backend.host.stages
    assert [record.disk_id for record in stages.records()] == [disk.id]
    pid = int((site.host.directory / "run/libvirt/libvirtd.pid").read_text())
    site.host.run(["kill", "-s", "KILL", str(pid)], check=True)
    try:
        site.disable(disk)
        wait_until(lambda: stages.records() == [], "the process with the disk's keys has ended")
    finally:
        site.host.restart_libvirtd()
    wait_until(lambda: not guest.is_active(), "the guest has ended")
    assert "KeyDisabled" in site.refusal(guest)
    site.enable(disk)
    guest.start()
    site.wait_until_watched(guest)


def test_a_guest_that_is_spared_runs_on_and_cannot_come_back(site: CustomerSite) -> None:
    guest, disk = site.guest(site.new_set(action=RevocationAction.NONE).name)
    guest.start()
    site.wait_until_watched(guest)
    site.disable(disk)
    site.wait_for_event("domain-revoked", domain=guest.name, action="none")
    wait_until(
        lambda: site.agent.metrics()["virt_sse_agent_spared_domains"] == 1,
        "the metrics count one spared domain",
    )
    time.sleep(2)
    assert guest.is_active()
    assert site.secrets() == []
    guest.destroy()
    assert "KeyDisabled" in site.refusal(guest)


def test_a_guest_with_an_ultra_disk_ends_like_any_other(site: CustomerSite) -> None:
    guest, disk = site.guest(site.new_set(action=RevocationAction.DESTROY).name, sku=DiskSku.ULTRA)
    guest.start()
    site.wait_until_watched(guest)
    site.disable(disk)
    wait_until(lambda: not guest.is_active(), "the guest has ended")
    assert "KeyDisabled" in site.refusal(guest)


def test_a_silent_vault_ends_no_guest_and_starts_none(site: CustomerSite) -> None:
    with LabVault() as vault, site.using(vault):
        encryption_set = site.new_set()
        (guest, disk), (waiting, _) = site.guest(encryption_set.name), site.guest(encryption_set.name)
        guest.start()
        site.wait_until_watched(guest)
        vault.kill()
        shown = f'key="{key_of(disk)}"'
        wait_until(lambda: _states(site, shown) == ["unreachable"], "the disk's key is known as unreachable")
        said = site.refusal(waiting)
        assert "does not answer" in said
        assert _show(site, disk).count("unreachable") == 1
        time.sleep(2)
        assert guest.is_active()
        assert not site.events("domain-revoked", domain=guest.name)
        vault.start()
        waiting.start()
        site.disable(disk)
        wait_until(lambda: not guest.is_active() and not waiting.is_active(), "both guests have ended")


def test_a_vault_that_falls_silent_lifts_no_revocation(site: CustomerSite) -> None:
    with LabVault() as vault, site.using(vault):
        guest, disk = site.guest(site.new_set(action=RevocationAction.PAUSE).name)
        guest.start()
        site.wait_until_watched(guest)
        site.disable(disk)
        wait_until(lambda: state_of(guest, site) == libvirt.VIR_DOMAIN_PAUSED, "the guest is paused")
        vault.kill()
        wait_until(
            lambda: _states(site, f'key="{key_of(disk)}"') == ["unreachable"],
            "the disk's key is known as unreachable",
        )
        time.sleep(1)
        assert state_of(guest, site) == libvirt.VIR_DOMAIN_PAUSED


def test_a_start_that_waits_for_a_frozen_vault_delays_no_revocation(site: CustomerSite) -> None:
    """libvirt lists no domains while a hook runs."""
    guest, disk = site.guest(site.new_set().name)
    guest.start()
    site.wait_until_watched(guest)
    first = site.keys
    with LabVault() as vault, site.using(vault):
        waiting, _ = site.guest(site.new_set().name)
        os.kill(vault.pid, signal.SIGSTOP)
        with ThreadPoolExecutor(1) as pool:
            refusal = pool.submit(site.refusal, waiting)
            time.sleep(1)
            first.enable(key_of(disk), enabled=False)
            took = site.wait_for_event("domain-action", domain=guest.name, action="destroy")
            assert not refusal.done()
            assert took < 3
            assert "does not answer" in refusal.result()
        os.kill(vault.pid, signal.SIGCONT)


def test_disks_follow_a_rotated_key_automatically(site: CustomerSite) -> None:
    encryption_set = site.new_set(automatic_rotation=True)
    guest, disk = site.guest(encryption_set.name)
    guest.start()
    site.wait_until_watched(guest)
    site.keys.rotate(encryption_set.key.name)
    wait_until(
        lambda: key_of(site.backend.disks.get(disk.name)) != key_of(disk),
        "the disk is under the new version of its key",
    )
    site.wait_for_event("rotated", **{"encryption-set": encryption_set.name})
    site.disable(disk)  # the old version, which nothing needs any more
    time.sleep(3)
    assert guest.is_active()
    assert all(finding.problem is None for finding in site.backend.sets.prove(encryption_set.name)[:1])
    site.disable(site.backend.disks.get(disk.name))
    wait_until(lambda: not guest.is_active(), "the guest has ended")


def state_of(guest: Guest, site: CustomerSite) -> int:
    with site.host.connect() as connection:
        return int(connection.lookupByName(guest.name).state()[0])


def _states(site: CustomerSite, shown: str) -> list[str]:
    return [
        name.partition('state="')[2].partition('"')[0]
        for name, value in site.agent.metrics().items()
        if name.startswith("virt_sse_agent_key_state") and shown in name and value
    ]


def _show(site: CustomerSite, disk: Disk) -> str:
    return subprocess.run(
        [PROGRAM, "disk", "show", disk.name],
        env=site.host.environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout

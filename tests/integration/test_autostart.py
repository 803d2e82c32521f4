"""Domains marked for autostart run after the start of a host, which libvirtd tells by a mark in ``/run``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.agent_site import forget_domains, prepared, wait_for_event
from support.waiting import wait_until
from virt_sse.backend import Backend
from virt_sse.domains.deferred_starts import DeferredStarts
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.guests import Guest
from virt_sse.lab.host import LabHost
from virt_sse.lab.recipes import boot_sector_image
from virt_sse.model.disks import NewDisk

NAMES = ("first", "second")


@pytest.fixture
def site(lab_host: LabHost) -> Iterator[Backend]:
    with prepared(lab_host, "[agent]\npoll-seconds = 0.5\n") as backend:
        yield backend
        forget_domains(lab_host)
        for name in NAMES:
            backend.disks.delete(name)


@pytest.fixture
def guests(lab_host: LabHost, site: Backend, acceleration: Callable[[str], Acceleration]) -> list[Guest]:
    """Two guests, each with a disk, shut off and marked for autostart."""
    guests = []
    for name in NAMES:
        new = NewDisk(name=name, place=lab_host.images / f"{name}.qcow2")
        site.transfer.import_image(new, boot_sector_image(stays=True))
        element = site.domains.disk_element(name)
        guest = Guest(lab_host, name, acceleration=acceleration("boot-sector"), disks=[element])
        guest.define()
        lab_host.virsh("autostart", name)
        guests.append(guest)
    return guests


def start_like_a_booted_host(host: LabHost) -> None:
    host.run(["rm", "-f", "/run/libvirt/qemu/autostarted"], check=True)
    host.restart_libvirtd()


def test_the_agent_starts_autostarted_domains_once_libvirtd_answers(
    lab_host: LabHost, site: Backend, guests: list[Guest]
) -> None:
    with LabAgent(lab_host) as agent:
        start_like_a_booted_host(lab_host)
        for guest in guests:
            wait_until(guest.is_active, f"{guest.name} runs", seconds=60)
            wait_for_event(agent, "domain-autostarted", domain=guest.name)
        wait_until(lambda: DeferredStarts(site.host.config).all() == [], "no start is left")


def test_without_an_agent_libvirtd_answers_and_a_later_agent_starts_the_domains(
    lab_host: LabHost, site: Backend, guests: list[Guest]
) -> None:
    start_like_a_booted_host(lab_host)
    assert not any(guest.is_active() for guest in guests)
    assert len(DeferredStarts(site.host.config).all()) == len(guests)
    lab_host.virsh("autostart", "--disable", guests[1].name)
    with LabAgent(lab_host):
        wait_until(guests[0].is_active, "the domain still marked runs", seconds=60)
        wait_until(lambda: DeferredStarts(site.host.config).all() == [], "no start is left")
    assert [guest.is_active() for guest in guests] == [True, False]


def test_a_restart_of_libvirtd_alone_starts_nothing(lab_host: LabHost, guests: list[Guest]) -> None:
    with LabAgent(lab_host):
        lab_host.restart_libvirtd()
        assert not any(guest.is_active() for guest in guests)

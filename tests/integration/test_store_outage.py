"""A store in PostgreSQL under an agent with guests: the server is stopped and started again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from support.agent_site import CONFIG, Site, prepared
from support.postgresql import PostgresqlServer
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.host import LabHost


@pytest.fixture
def site(
    lab_host: LabHost, acceleration: Callable[[str], Acceleration], postgresql: PostgresqlServer
) -> Iterator[Site]:
    with postgresql.database() as name:
        config = f"{CONFIG}poll-seconds = 0.4\n[store]\nurl = '{postgresql.url(name)}'\n"
        with prepared(lab_host, config) as backend, LabAgent(lab_host) as agent:
            site = Site(lab_host, backend, agent, acceleration("boot-sector"))
            yield site
            site.forget_domains()


def test_guests_and_agent_outlive_an_outage_of_the_store(site: Site, postgresql: PostgresqlServer) -> None:
    guest, disk = site.guest()
    waiting, other = site.guest()
    guest.start()
    guest.wait_for("verified 8 sectors, ok")
    site.wait_until_watched(guest)
    leases = site.backend.host.leases
    assert [each.leases for each in leases.hosts()] == [2]
    pid = site.agent.pid
    postgresql.stop()
    try:
        site.wait_for_event("store-unavailable")
        assert "the store failed" in site.refusal(waiting)
        assert guest.is_active()
        assert site.agent.status()["pid"] == site.agent.own_pid
        guest.destroy()  # the end of a domain needs no store
        wait_until(lambda: not site.secrets(), "the secrets are gone")
    finally:
        postgresql.start()
    waiting.start()
    waiting.wait_for("verified 8 sectors, ok")
    site.wait_until_watched(waiting)
    assert site.agent.pid == pid
    guest.start()
    guest.wait_for("verified 8 sectors, ok")
    assert {disk.id, other.id} <= {use.resource_id for use in leases.uses()}

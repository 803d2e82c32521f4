"""A host dies, and another host takes over its protected domains."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from support.agent_site import CONFIG, Site, prepared, share_keys
from support.loaded_commands import run_command
from support.postgresql import PostgresqlServer
from support.stores import execute
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.agents import LabAgent
from virt_sse.lab.host import LabHost
from virt_sse.model.hosts import SILENT_SECONDS
from virt_sse.model.protected_domains import ProtectedDomain


class TwoHosts:
    """Two lab hosts with one store, one keyring and one file system of images; one of them is to die.

    :ivar url: of the store.
    """

    def __init__(self, dying: Site, other: Site, url: str) -> None:
        self.dying = dying
        self.other = other
        self.url = url

    def kept(self) -> dict[str, ProtectedDomain]:
        return {each.name: each for each in self.other.backend.host.store.protected_domains.all()}

    def dies(self) -> str:
        """Kill the host and its agent, and let time pass: the host's id."""
        self.dying.agent.kill()
        self.dying.host.kill()
        execute(self.url, "UPDATE hosts SET seen = seen - :age", age=SILENT_SECONDS)
        return str(self.dying.backend.host.leases.identity.id)

    def evacuate(self, host: str, *options: str, status: int = 0) -> dict[str, tuple[str, str | None]]:
        """The results and reasons of ``host evacuate``, by domain."""
        said = self.other.virt_sse("host", "evacuate", host, "--output", "json", *options, status=status)
        return {row["domain"]: (row["result"], row["reason"]) for row in json.loads(said)}


@pytest.fixture
def hosts(
    second_lab_host: LabHost, acceleration: Callable[[str], Acceleration], postgresql: PostgresqlServer
) -> Iterator[TwoHosts]:
    with ExitStack() as stack:
        url = postgresql.url(stack.enter_context(postgresql.database()))
        config = f"{CONFIG}poll-seconds = 0.4\n[store]\nurl = '{url}'\n"
        dying = stack.enter_context(LabHost())
        sites = []
        for host in (second_lab_host, dying):
            if sites:
                share_keys(second_lab_host, host)
            backend = stack.enter_context(prepared(host, config))
            agent = stack.enter_context(LabAgent(host))
            sites.append(Site(host, backend, agent, acceleration("boot-sector")))
        yield TwoHosts(sites[1], sites[0], url)
        sites[0].forget_domains()


def test_the_domains_of_a_dead_host_start_on_another(hosts: TwoHosts) -> None:
    dying, other = hosts.dying, hosts.other
    (running, disk), (stopped, _), (broken, lost) = (dying.guest() for _ in range(3))
    for guest in (running, stopped, broken):
        assert "protected" in dying.virt_sse("vm", "protect", guest.name)
    broken.start()
    running.start()
    running.wait_for("verified 8 sectors, ok")
    dying.host.virsh("desc", running.name, "--config", "changed since")
    dying.host.virsh("autostart", running.name)

    def followed() -> bool:
        kept = hosts.kept()[running.name]
        return "changed since" in kept.definition and kept.is_autostarted

    wait_until(followed, "the store follows", seconds=40)
    alive = str(dying.backend.host.leases.identity.id)
    refused = run_command(["host", "evacuate", alive, "--yes"], other.host.environment)
    assert (refused.returncode, "is alive" in refused.stderr) == (1, True)
    host = hosts.dies()
    lost.path.unlink()
    expected = {each.name: "would be taken over" for each in (running, stopped, broken)}
    assert {name: result for name, (result, _) in hosts.evacuate(host, "--dry-run").items()} == expected

    found = hosts.evacuate(host, "--yes", status=1)
    assert found[running.name] == ("started", None)
    assert found[stopped.name] == ("defined", None)
    result, reason = found[broken.name]
    assert result == "failed"
    assert reason
    assert lost.name in reason
    wait_until(lambda: "verified 8 sectors, ok" in running.serial, "the guest finds its data")
    assert [usage for usage in other.secrets() if str(disk.id) in usage]
    names = set(other.host.virsh("list", "--all", "--name").stdout.split())
    assert names == {running.name, stopped.name}
    assert other.host.virsh("list", "--autostart", "--all", "--name").stdout.split() == [running.name]
    kept = hosts.kept()
    ours = other.backend.host.leases.identity.id
    assert {kept[name].host_id for name in names} == {ours}
    assert str(kept[broken.name].host_id) == host
    # The next command tries what is left.
    assert hosts.evacuate(host, status=1).keys() == {broken.name}
    assert f"no longer protected: domain {broken.name}" in other.virt_sse("vm", "unprotect", broken.name)
    assert hosts.evacuate(host) == {}

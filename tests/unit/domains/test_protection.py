"""Definitions in the store: authenticated, and of domains with all parts within reach of another host."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import libvirt
import pytest

from support.postgresql import PostgresqlServer
from support.stores import execute
from virt_sse.audit.record import Component
from virt_sse.config import Config
from virt_sse.domains.evacuation import Evacuated, Evacuator, TakeoverResult
from virt_sse.domains.protection import DomainProtection
from virt_sse.errors import HostFencedError, VirtSseError, VmStateError
from virt_sse.keys.host import Host
from virt_sse.libvirt.connection import connected
from virt_sse.model.hosts import SILENT_SECONDS, HostIdentity
from virt_sse.model.protected_domains import Evacuation

_UUID = "0b2d2d1c-9d3c-4a83-9d0c-7a1d5a3f8f1"
_DOMAINS = {
    "web": "",
    "screen": "<graphics type='vnc' port='-1' passwd='never-kept'/>",
    "tpm": "<tpm model='tpm-tis'><backend type='emulator' version='2.0'/></tpm>",
}


def configured(root: Path, store: str) -> Config:
    """The configuration of a host whose libvirt has all of ``_DOMAINS``, running (libvirt's test driver)."""
    folder = root / "etc/virt-sse"
    folder.mkdir(parents=True)
    domains = (
        f"<domain type='test'><name>{name}</name><uuid>{_UUID}{number}</uuid><memory>1024</memory>"
        f"<os><type>hvm</type></os><devices>{device}</devices></domain>"
        for number, (name, device) in enumerate(_DOMAINS.items())
    )
    (folder / "node.xml").write_text(f"<node>{''.join(domains)}</node>")
    uri = f"test://{folder / 'node.xml'}"
    (folder / "config.toml").write_text(f"[store]\nurl = '{store}'\n[libvirt]\nuri = '{uri}'\n")
    return Config.load(root)


@pytest.fixture
def url(postgresql: PostgresqlServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    with postgresql.database() as name:
        yield postgresql.url(name)


@pytest.fixture
def host(tmp_path: Path, url: str) -> Iterator[Host]:
    with closing(Host.open(configured(tmp_path / "a", url), component=Component.HOST)) as host:
        yield host


@pytest.fixture
def dead(host: Host, url: str) -> str:
    """The id of a fenced host that has the domain ``web`` of *host*, and ran it."""
    DomainProtection(host).protect("web")
    (kept,) = host.store.protected_domains.all()
    identity = HostIdentity(kept.id, "dead", kept.id)
    host.store.hosts.enter(identity)
    host.store.protected_domains.follow(dataclasses.replace(kept, host_id=identity.id), kept.host_id)
    host.store.hosts.start(identity, kept.id, [], [])
    execute(url, "UPDATE hosts SET seen = seen - :age", age=SILENT_SECONDS)
    host.store.hosts.fence(host.store.hosts.get("dead"))
    return "dead"


def evacuate(host: Host, name: str) -> list[tuple[str, TakeoverResult, VirtSseError | None]]:
    found: list[Evacuated] = []
    Evacuator(host).evacuate(host.store.hosts.get(name), found.append)
    return [(each.domain.name, each.result, each.reason) for each in found]


def test_a_store_of_one_host_protects_nothing(tmp_path: Path) -> None:
    config = configured(tmp_path, f"sqlite:///{tmp_path}/store.db")
    with (
        closing(Host.open(config, component=Component.HOST)) as host,
        pytest.raises(VmStateError, match="SQLite"),
    ):
        DomainProtection(host).protect("web")


@pytest.mark.parametrize(
    ("name", "reason"), [("screen", "has a password"), ("tpm", "is a file of this host")]
)
def test_what_does_not_reach_another_host_is_refused(host: Host, name: str, reason: str) -> None:
    with pytest.raises(VmStateError, match=reason):
        DomainProtection(host).protect(name)
    assert host.store.protected_domains.all() == []


def test_a_domain_is_protected_and_followed(host: Host) -> None:
    protection = DomainProtection(host)
    protection.protect("web")
    (kept,) = host.store.protected_domains.all()
    protection.check(kept)
    store = host.store.protected_domains
    store.protect(dataclasses.replace(kept, definition="<domain/>", name="old"))
    with connected(host.config.libvirt_uri) as connection:
        assert protection.follow(connection) == []
    assert store.all() == [kept]
    with pytest.raises(VmStateError, match="no protected domain is called 'other'"):
        protection.unprotect("other")
    protection.unprotect(str(kept.id))
    assert store.all() == []


def test_a_running_domain_becomes_the_domain_of_its_host(host: Host) -> None:
    protection, store = DomainProtection(host), host.store.protected_domains
    protection.protect("web")
    (kept,) = store.all()
    host.store.hosts.enter(HostIdentity(kept.id, "before", kept.id))
    store.follow(dataclasses.replace(kept, host_id=kept.id), kept.host_id)
    with connected(host.config.libvirt_uri) as connection:
        domain = connection.lookupByName("web")
        domain.destroy()
        protection.follow(connection)
        assert store.all()[0].host_id == kept.id
        domain.create()
        protection.follow(connection)
    assert store.all() == [kept]


def test_a_fenced_host_evacuates_nothing(host: Host, dead: str, url: str) -> None:
    execute(url, "UPDATE hosts SET fenced = 1 WHERE id = :id", id=host.leases.identity.id)
    with pytest.raises(HostFencedError):
        evacuate(host, dead)


def test_a_host_that_is_not_fenced_is_not_evacuated(host: Host) -> None:
    host.leases.renew()
    with pytest.raises(VmStateError, match="is not fenced"):
        evacuate(host, str(host.leases.identity.id))


@pytest.mark.parametrize("change", ["definition", "is_autostarted", "seal", "id"])
def test_a_definition_changed_in_the_database_is_refused(
    host: Host, dead: str, url: str, change: str
) -> None:
    statements = {
        "definition": "UPDATE protected_domains SET definition = replace(definition, '1024', '4096')",
        "is_autostarted": "UPDATE protected_domains SET is_autostarted = NOT is_autostarted",
        "seal": "UPDATE protected_domains SET seal = 'x'",
        "id": "UPDATE protected_domains SET id = '00000000-0000-4000-8000-000000000001'",
    }
    execute(url, statements[change])
    ((_, result, reason),) = evacuate(host, dead)
    assert result is TakeoverResult.FAILED
    assert "no host with this host key has written the definition" in str(reason)
    (kept,) = host.store.protected_domains.all()
    assert kept.host_id == host.store.hosts.get(dead).id


def test_a_killed_evacuation_is_finished_by_the_next_command(
    host: Host, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Stands for SIGKILL: the handlers below do not run."""

    def killed(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("virt_sse.domains.evacuation._define_and_start", killed)
        patch.setattr("virt_sse.store.protected_domains.ProtectedDomainStore.give_back", killed)
        with contextlib.suppress(KilledError):
            evacuate(host, dead)
    (kept,) = host.store.protected_domains.all()
    assert (kept.host_id, kept.evacuation) == (host.leases.identity.id, Evacuation.START)
    assert evacuate(host, dead) == [("web", TakeoverResult.STARTED, None)]
    assert evacuate(host, dead) == []


def test_a_domain_that_cannot_start_is_left_to_other_hosts(
    host: Host, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise libvirt.libvirtError("no such network")

    with monkeypatch.context() as patch:
        patch.setattr(libvirt.virConnect, "defineXML", refused)
        ((_, result, reason),) = evacuate(host, dead)
    assert (result, str(reason)) == (TakeoverResult.FAILED, "no such network")
    (kept,) = host.store.protected_domains.all()
    assert (kept.host_id, kept.evacuation) == (host.store.hosts.get(dead).id, Evacuation.START)

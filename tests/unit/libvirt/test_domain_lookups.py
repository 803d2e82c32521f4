"""Lookups of domains, with libvirt's own test driver."""

from __future__ import annotations

from collections.abc import Iterator
from uuid import UUID, uuid4

import libvirt
import pytest

from virt_sse.libvirt import domains


@pytest.fixture
def connection() -> Iterator[libvirt.virConnect]:
    opened = libvirt.open("test:///default")
    yield opened
    opened.close()


def test_a_running_domain_runs_until_it_ends(connection: libvirt.virConnect) -> None:
    domain = domains.lookup(connection, "test")
    domain_id = UUID(bytes=domain.UUID())
    assert domains.runs(connection, domain_id)
    domain.destroy()
    assert not domains.runs(connection, domain_id)


def test_an_unknown_domain_does_not_run(connection: libvirt.virConnect) -> None:
    assert not domains.runs(connection, uuid4())


def test_a_failure_of_libvirt_does_not_pass_for_an_ended_domain() -> None:
    class Failing:
        def lookupByUUID(self, _: bytes) -> None:
            raise libvirt.libvirtError("internal error")

    with pytest.raises(libvirt.libvirtError):
        domains.runs(Failing(), uuid4())  # type: ignore[arg-type]

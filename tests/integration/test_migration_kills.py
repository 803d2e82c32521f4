"""A writing guest migrates back and forth, its key is rotated, and processes of both hosts are killed.

``VIRT_SSE_MIGRATIONS=20`` migrates twenty times; ``VIRT_SSE_MIGRATION_KILLS=50`` kills fifty processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from soak.migrations import MigrationKill, MigrationKills
from support.migration_site import MigrationSite, MovingGuest, migration_site_fixture
from support.writing_guest import newest_block
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.recipes import LinuxMicro

MIGRATIONS = int(os.environ.get("VIRT_SSE_MIGRATIONS", "0"))
SEEDS = range(1, 1 + int(os.environ.get("VIRT_SSE_MIGRATION_KILLS", "0")))


site = migration_site_fixture("site")


@pytest.fixture(
    scope="module",
    params=["qcow2", "raw", "qcow2-double", "raw-double", "raw-storage", "qcow2-at-host"],
)
def moving(
    request: pytest.FixtureRequest,
    site: MigrationSite,
    acceleration: Callable[[str], Acceleration],
    linux_micro: LinuxMicro,
) -> Iterator[MigrationKills]:
    image_format, _, kind = request.param.partition("-")
    sets = {"double": site.double, "storage": site.placed_below}
    disk = site.disk(image_format, encryption_set=sets.get(kind, site.set).name)
    linux = acceleration("linux-micro")
    guest = MovingGuest(site, disk, linux, linux_micro, at_host=kind == "at-host")
    guest.run()
    yield MigrationKills(site, guest, disk)
    guest.check()
    site.forget_domains()
    assert newest_block(site.content(disk)) >= guest.acknowledged


@pytest.mark.slow
@pytest.mark.skipif(not MIGRATIONS, reason="VIRT_SSE_MIGRATIONS is not set")
def test_a_guest_migrates_back_and_forth_while_its_key_is_rotated(moving: MigrationKills) -> None:
    options = ((), ("--p2p",), ("--p2p", "--persistent"))
    for number in range(MIGRATIONS):
        if number % 4 == 0:
            moving.rotate()
        moving.move(*options[number % len(options)])


@pytest.mark.slow
@pytest.mark.skipif(not SEEDS, reason="VIRT_SSE_MIGRATION_KILLS is not set")
@pytest.mark.parametrize("seed", SEEDS or [1])
def test_a_kill_leaves_the_guest_whole_and_its_key_on_its_host(moving: MigrationKills, seed: int) -> None:
    kill = MigrationKill.choose(seed, has_daemon=moving.has_daemon)
    print(f"{kill}: {moving.attempt(kill)}")  # noqa: T201 -- the tally of a soak

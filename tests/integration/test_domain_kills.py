"""Some of the processes that serve a domain are killed while the domain starts, changes or ends.

``VIRT_SSE_DOMAIN_KILLS=5`` kills each process in each action at five moments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from soak.domains import ACTIONS, DomainKill, DomainSite
from support.stage_site import stage_site
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.host import LabHost

SEEDS = range(1, 1 + int(os.environ.get("VIRT_SSE_DOMAIN_KILLS", "0")))
FEW = [DomainKill.choose("start", "agent", 1), DomainKill.choose("attach", "client", 1)]
KILLS = [
    DomainKill.choose(action, process, seed)
    for seed in SEEDS
    for action, processes in ACTIONS.items()
    for process in processes
]


@pytest.fixture(scope="module")
def domain(lab_host: LabHost, acceleration: Callable[[str], Acceleration]) -> Iterator[DomainSite]:
    with stage_site(lab_host, acceleration("boot-sector")) as site:
        yield DomainSite(site)
        site.forget_domains()


@pytest.mark.slow
@pytest.mark.parametrize("kill", KILLS or FEW, ids=str)
def test_the_domain_starts_again_with_its_data_and_leaves_nothing(
    domain: DomainSite, kill: DomainKill
) -> None:
    domain.attempt(kill)

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from agent_site import CONFIG, CustomerSite, customer_site

from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.host import LabHost
from virt_sse.lab.vaults import LabVault


@pytest.fixture(scope="module")
def running_site(
    lab_host: LabHost, lab_vault: LabVault, acceleration: Callable[[str], Acceleration]
) -> Iterator[CustomerSite]:
    config = CONFIG + "poll-seconds = 0.4\n"
    with customer_site(lab_host, lab_vault, acceleration("boot-sector"), config) as site:
        yield site


@pytest.fixture
def site(running_site: CustomerSite) -> Iterator[CustomerSite]:
    yield running_site
    running_site.forget_domains()

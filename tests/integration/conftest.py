from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator

import pytest

from support import loaded_commands
from support.agent_site import CONFIG, CustomerSite, customer_site
from support.lab_operator import Operator
from support.leftovers import descendants
from support.waiting import wait_until
from virt_sse.lab.acceleration import Acceleration
from virt_sse.lab.host import LabHost
from virt_sse.lab.vaults import LabVault

LAB = ("virt_sse.lab", "/lab/supervisor.py", "libvirtd", "virtlogd", "postgres", "/bao server", "ceph-")
"""Parts of the command lines of processes that serve all tests of a session."""


@pytest.fixture(scope="session", autouse=True)
def _loaded_commands() -> None:
    """Start the server of commands, which serves all tests of a session."""
    loaded_commands.start()


@pytest.fixture(scope="module", autouse=True)
def _no_process_is_left(_loaded_commands: None) -> Iterator[None]:
    """Check that a module of tests leaves no process: not in a lab host, where orphans have a new parent."""
    known = set(descendants())

    def left() -> list[str]:
        return [
            said
            for pid, said in descendants().items()
            if pid not in known | loaded_commands.servers()
            and not any(part in said for part in LAB)
            and not said.startswith("Z")
        ]

    yield
    wait_until(lambda: not left(), f"no process is left: {left()}")


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


@pytest.fixture(scope="module")
def prepared_host(lab_host: LabHost) -> Operator:
    """An operator at an initialised lab host."""
    operator = Operator(lab_host)
    operator.virt_sse("host", "init")
    lab_host.restart_libvirtd()
    return operator


@pytest.fixture
def operator(prepared_host: Operator) -> Iterator[Operator]:
    """An operator at an initialised lab host; the test's domains end with the test."""
    yield prepared_host
    prepared_host.forget_domains()


@pytest.fixture
def name() -> str:
    """A name unique to the test."""
    return f"t{uuid.uuid4().hex[:8]}"

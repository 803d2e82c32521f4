"""The lab as pytest fixtures. A test is skipped, with a reason, if the machine lacks a requirement.

``lab_host``, ``second_lab_host``
    running :class:`virt_sse.lab.host.LabHost`, one each for the whole session
``lab_vault``
    a running :class:`virt_sse.lab.vaults.LabVault` for the whole session
``lab_openbao``
    a running :class:`virt_sse.lab.openbao.LabOpenBao` for the whole session
``lab_token``
    a new :class:`virt_sse.lab.tokens.LabToken` of SoftHSM for each test; ``lab_hsm`` makes further tokens
``lab_nss_token``
    the token of NSS, one for the whole session
``acceleration``
    :func:`virt_sse.lab.acceleration.probe`
``boot_sector``
    the boot-sector guest's image; copy or import it
``linux_micro``
    the linux-micro guest, a :class:`virt_sse.lab.recipes.LinuxMicro`
``key_provider_bench``
    the key provider tested by :mod:`virt_sse.contract`; overridden in the plugin's project

The terminal summary lists the acceleration of each guest. Heavy imports happen inside the fixtures, because
pytest loads this module in every environment with virt-sse installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from virt_sse.contract import KeyProviderBench
    from virt_sse.lab.acceleration import Acceleration, GuestName
    from virt_sse.lab.ceph import LabCeph
    from virt_sse.lab.host import LabHost
    from virt_sse.lab.openbao import LabOpenBao
    from virt_sse.lab.recipes import LinuxMicro
    from virt_sse.lab.tokens import LabHsm, LabToken
    from virt_sse.lab.vaults import LabVault

pytest.register_assert_rewrite("virt_sse.contract")

_USED = pytest.StashKey[set[str]]()
_WORKER_OUTPUT = "virt-sse-lab"


@contextmanager
def _skip_if_unavailable() -> Iterator[None]:
    from virt_sse.errors import LabUnavailableError
    from virt_sse.system.extras import extra_error

    try:
        yield
    except LabUnavailableError as exc:
        pytest.skip(f"{exc}; {exc.hint}" if exc.hint else str(exc))
    except ModuleNotFoundError as exc:
        missing = extra_error(exc)
        if missing is None:
            raise
        pytest.skip(f"{missing}; {missing.hint}")


def _running_host() -> Iterator[LabHost]:
    from virt_sse.lab.host import LabHost

    host = LabHost()
    with _skip_if_unavailable():
        host.start()
    try:
        yield host
    finally:
        host.stop()


@pytest.fixture(scope="session")
def lab_host() -> Iterator[LabHost]:
    """A running lab host, shared by the session's tests."""
    yield from _running_host()


@pytest.fixture(scope="session")
def second_lab_host() -> Iterator[LabHost]:
    """A second running lab host, shared by the session's tests."""
    yield from _running_host()


@pytest.fixture(scope="session")
def lab_vault() -> Iterator[LabVault]:
    """A running key vault, shared by the session's tests."""
    with ExitStack() as stack:
        with _skip_if_unavailable():
            from virt_sse.lab.vaults import LabVault

            vault = stack.enter_context(LabVault())
        yield vault


@pytest.fixture(scope="session")
def lab_openbao() -> Iterator[LabOpenBao]:
    """A running OpenBao server, shared by the session's tests."""
    with ExitStack() as stack:
        with _skip_if_unavailable():
            from virt_sse.lab.openbao import LabOpenBao

            server = stack.enter_context(LabOpenBao())
        yield server


@pytest.fixture(scope="session")
def lab_ceph() -> Iterator[LabCeph]:
    """A running Ceph cluster, shared by the session's tests."""
    with ExitStack() as stack:
        with _skip_if_unavailable():
            from virt_sse.lab.ceph import LabCeph

            cluster = stack.enter_context(LabCeph())
        yield cluster


@pytest.fixture(scope="session")
def lab_hsm() -> Iterator[LabHsm]:
    """SoftHSM for this process, shared by the session's tests."""
    with ExitStack() as stack:
        with _skip_if_unavailable():
            from virt_sse.lab.tokens import LabHsm

            hsm = stack.enter_context(LabHsm())
        yield hsm


@pytest.fixture
def lab_token(lab_hsm: LabHsm) -> Iterator[LabToken]:
    """A new token."""
    with lab_hsm.token() as token:
        yield token


@pytest.fixture(scope="session")
def lab_nss_token() -> Iterator[LabToken]:
    """NSS's token, shared by the session's tests."""
    with ExitStack() as stack:
        with _skip_if_unavailable():
            from virt_sse.lab.tokens import nss_token

            token = stack.enter_context(nss_token())
        yield token


@pytest.fixture(scope="session")
def acceleration(pytestconfig: pytest.Config) -> Callable[..., Acceleration]:
    """Function from a guest's name to its acceleration on this machine; takes *slow_kvm* as :func:`probe`."""
    from virt_sse.lab.acceleration import probe

    used = pytestconfig.stash.setdefault(_USED, set())

    def probe_or_skip(guest: GuestName, *, slow_kvm: bool = False) -> Acceleration:
        with _skip_if_unavailable():
            found = probe(guest, slow_kvm=slow_kvm)
        used.add(str(found))
        return found

    return probe_or_skip


@pytest.fixture(scope="session")
def boot_sector() -> Path:
    """The raw image of the boot-sector guest."""
    from virt_sse.lab.recipes import boot_sector_image

    with _skip_if_unavailable():
        return boot_sector_image()


@pytest.fixture(scope="session")
def linux_micro() -> LinuxMicro:
    """The kernel and initramfs of the linux-micro guest."""
    from virt_sse.lab.recipes import linux_micro as built_linux_micro

    with _skip_if_unavailable():
        return built_linux_micro()


@pytest.fixture
def key_provider_bench() -> KeyProviderBench:
    """The key provider that the contract suite tests."""
    pytest.fail(
        "no key provider to test: override the fixture 'key_provider_bench' in the conftest.py of the"
        " project's top folder, and run pytest there"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker of the contract suite."""
    config.addinivalue_line("markers", "slow: takes about a second or more")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass a pytest-xdist worker's results to the controller, because workers have no terminal."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_WORKER_OUTPUT] = sorted(session.config.stash.get(_USED, ()))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the results of a pytest-xdist worker after its end."""
    used = node.config.stash.setdefault(_USED, set())
    used.update(getattr(node, "workeroutput", {}).get(_WORKER_OUTPUT, ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the acceleration of the lab's guests."""
    used = terminalreporter.config.stash.get(_USED, ())
    if used:
        terminalreporter.section("virt-sse lab")
        for line in sorted(used):
            terminalreporter.line(line)

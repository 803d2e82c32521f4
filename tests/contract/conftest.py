"""The contract suite runs against every registered key provider."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from benches import BENCHES, AdministeredToken

from virt_sse.config import Config
from virt_sse.contract import KeyProviderBench
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.plugins import PluginHost

_REGISTERED = PluginHost(Config.load(Path(__file__).parent)).key_provider_names()


@pytest.fixture(scope="session")
def softhsm(lab_hsm: LabHsm) -> Iterator[AdministeredToken]:
    with lab_hsm.token() as token, AdministeredToken.open(token) as administered:
        yield administered


@pytest.fixture(scope="session")
def nss(lab_nss_token: LabToken) -> Iterator[AdministeredToken]:
    with AdministeredToken.open(lab_nss_token) as administered:
        yield administered


@pytest.fixture(params=sorted({*_REGISTERED, *BENCHES}))
def key_provider_bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeyProviderBench]:
    name: str = request.param
    if name not in BENCHES:
        pytest.fail(f"key provider {name!r} has no entry in tests/contract/benches.py")
    directory = Config.load(tmp_path).key_provider(name.split(",")[0]).directory
    with BENCHES[name](directory, request.getfixturevalue) as bench:
        yield bench

"""Opens every registered key provider, and that of ``plugins/README.md``, the way virt-sse itself does."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from uuid import UUID

import pytest
import readme_plugin
from benches import BENCHES, AdministeredToken, Bench

from virt_sse.config import Config
from virt_sse.lab.tokens import LabHsm, LabToken
from virt_sse.model.keys import DekContext, KeyId, KeyProvider, WrappedDek
from virt_sse.plugins import ENTRY_POINT_GROUP, PluginHost

_ENCRYPTION_SET = UUID(int=1)
_REGISTERED = PluginHost(Config.load(Path(__file__).parent)).key_provider_names()


@pytest.fixture(scope="session")
def entry_points(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EntryPoint]]:
    folder = tmp_path_factory.mktemp("readme-plugin")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.syspath_prepend(folder)
        installed = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        yield [*installed, *readme_plugin.install(folder)]


@pytest.fixture(scope="session")
def softhsm(lab_hsm: LabHsm) -> Iterator[AdministeredToken]:
    with lab_hsm.token() as token, AdministeredToken.open(token) as administered:
        yield administered


@pytest.fixture(scope="session")
def nss(lab_nss_token: LabToken) -> Iterator[AdministeredToken]:
    with AdministeredToken.open(lab_nss_token) as administered:
        yield administered


@pytest.fixture(params=sorted({*_REGISTERED, *BENCHES}))
def bench_name(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name not in BENCHES:
        pytest.fail(f"key provider {name!r} has no entry in tests/contract/benches.py")
    return name


@pytest.fixture
def provider_name(bench_name: str) -> str:
    return bench_name.split(",")[0]


@pytest.fixture
def bench(
    bench_name: str, provider_name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Bench]:
    config = Config.load(tmp_path)
    directory = config.key_provider(provider_name).directory
    with BENCHES[bench_name](directory, request.getfixturevalue) as bench:
        if bench.identity is not None:
            config.identity_directory.mkdir(mode=0o700, parents=True)
            bench.identity.rename(config.identity(_ENCRYPTION_SET))
        yield bench


@pytest.fixture
def open_provider(
    provider_name: str, bench: Bench, tmp_path: Path, entry_points: list[EntryPoint]
) -> Iterator[Callable[..., KeyProvider]]:
    """Opens one more instance of the provider, with ``options`` added to those it needs."""
    hosts: list[PluginHost] = []

    def open_one(**options: object) -> KeyProvider:
        config = dataclasses.replace(
            Config.load(tmp_path), provider_options={provider_name: {**bench.options, **options}}
        )
        hosts.append(PluginHost(config, entry_points))
        return hosts[-1].key_provider(provider_name, _ENCRYPTION_SET if bench.identity else None)

    yield open_one
    for host in hosts:
        host.close()


@pytest.fixture
def provider(open_provider: Callable[..., KeyProvider]) -> KeyProvider:
    return open_provider()


@pytest.fixture
def in_other_process(
    provider_name: str, bench: Bench, tmp_path: Path, entry_points: list[EntryPoint]
) -> Callable[[WrappedDek, DekContext], WrappedDek]:
    """Let another process unwrap a DEK and wrap the DEK again with the current key."""

    def run(wrapped: WrappedDek, context: DekContext) -> WrappedDek:
        request = {
            "root": str(tmp_path),
            "provider": provider_name,
            "options": bench.options,
            "encryption-set": str(_ENCRYPTION_SET) if bench.identity else None,
            "entry_points": [(point.name, point.value, point.group) for point in entry_points],
            "wrapped": [wrapped.ciphertext.hex(), wrapped.algorithm, dataclasses.astuple(wrapped.key)],
            "context": [str(context.disk_id), context.slot],
        }
        script = Path(__file__).with_name("other_process.py")
        result = subprocess.run(
            [sys.executable, script],
            input=json.dumps(request),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.returncode == 0, result.stderr
        ciphertext, algorithm, key = json.loads(result.stdout)
        return WrappedDek(bytes.fromhex(ciphertext), algorithm, KeyId(*key))

    return run

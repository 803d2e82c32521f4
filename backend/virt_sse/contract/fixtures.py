"""Fixtures of the contract suite: they open the provider under test the way virt-sse itself does."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virt_sse.config import Config
from virt_sse.contract import KeyProviderBench
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyProvider, WrappedDek
from virt_sse.plugins import PluginHost
from virt_sse.system.files import private_folder

__all__ = ["bench", "context", "dek", "in_other_process", "open_provider", "provider", "wrapped"]

_ENCRYPTION_SET = uuid.UUID(int=1)
_SECONDS = 120


@pytest.fixture
def bench(key_provider_bench: KeyProviderBench, tmp_path: Path) -> KeyProviderBench:
    """The provider under test, on a host of its own with the root folder *tmp_path*."""
    if key_provider_bench.identity is not None:
        identity = Config.load(tmp_path).identity(_ENCRYPTION_SET)
        private_folder(identity.parent)
        shutil.copy2(key_provider_bench.identity, identity)
    return key_provider_bench


@pytest.fixture
def open_provider(bench: KeyProviderBench, tmp_path: Path) -> Iterator[Callable[..., KeyProvider]]:
    """Opens one more instance of the provider, with ``options`` added to those of the bench."""
    hosts: list[PluginHost] = []

    def open_one(**options: object) -> KeyProvider:
        config = dataclasses.replace(
            Config.load(tmp_path), provider_options={bench.provider: {**bench.options, **options}}
        )
        hosts.append(PluginHost(config))
        return hosts[-1].key_provider(bench.provider, _ENCRYPTION_SET if bench.identity else None)

    yield open_one
    for host in hosts:
        host.close()


@pytest.fixture
def provider(open_provider: Callable[..., KeyProvider]) -> KeyProvider:
    """An instance of the provider."""
    return open_provider()


@pytest.fixture
def context() -> DekContext:
    """The disk and the slot of the DEK."""
    return DekContext(uuid.uuid4(), "service")


@pytest.fixture
def dek() -> Dek:
    """A new DEK."""
    return Dek.generate()


@pytest.fixture
def wrapped(provider: KeyProvider, bench: KeyProviderBench, dek: Dek, context: DekContext) -> WrappedDek:
    """The DEK, wrapped with the current version of the bench's key."""
    return provider.wrap(dek, provider.current_key(bench.key), context=context)


@pytest.fixture
def in_other_process(
    bench: KeyProviderBench, tmp_path: Path
) -> Callable[[WrappedDek, DekContext], WrappedDek]:
    """Lets another process unwrap a DEK and wrap the DEK again with the current key."""

    def run(wrapped: WrappedDek, context: DekContext) -> WrappedDek:
        request = {
            "root": str(tmp_path),
            "provider": bench.provider,
            "options": dict(bench.options),
            "encryption-set": str(_ENCRYPTION_SET) if bench.identity else None,
            "wrapped": [wrapped.ciphertext.hex(), wrapped.algorithm, dataclasses.astuple(wrapped.key)],
            "context": [str(context.disk_id), context.slot],
        }
        result = subprocess.run(
            [sys.executable, "-m", "virt_sse.contract.other_process"],
            input=json.dumps(request),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
        assert result.returncode == 0, result.stderr
        ciphertext, algorithm, key = json.loads(result.stdout)
        return WrappedDek(bytes.fromhex(ciphertext), algorithm, KeyId(*key))

    return run

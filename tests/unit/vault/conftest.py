from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.vault_doubles import Clock, Records
from virt_sse.vault.home.layout import VaultDirectory
from virt_sse.vault.initialise import initialise
from virt_sse.vault.vault import Vault, open_vault


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def records() -> Records:
    return Records()


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> VaultDirectory:
    """A new vault to be copied: a copy takes a tenth of the time of a new vault."""
    return initialise(tmp_path_factory.mktemp("pristine") / "vault")


@pytest.fixture
def directory(pristine: VaultDirectory, tmp_path: Path) -> VaultDirectory:
    """A vault that is not served."""
    return VaultDirectory(Path(shutil.copytree(pristine.path, tmp_path / "vault")))


@pytest.fixture
def vault(directory: VaultDirectory, clock: Clock, records: Records) -> Iterator[Vault]:
    """The opened vault, which takes its time from the clock."""
    with open_vault(directory, records, clock=clock) as vault:
        yield vault

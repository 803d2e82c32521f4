"""A few of the kills of ``tox -e soak``, so that the soak itself is tested."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from random import Random

import pytest

from soak.attempt import Attempts, Failure, Outcome
from soak.kill_points import KillBy, KillPoint, Measured
from soak.operations import OPERATIONS, FileOperation
from soak.sites import PATTERN, FileSite
from soak.vault_attempt import VaultAttempts
from soak.vault_operations import VAULT_OPERATIONS
from soak.vault_site import VaultSite
from support import images

FEW = (
    "disk-create-single-qcow2",
    "disk-reencrypt-single-qcow2",
    "key-rewrap",
)


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attempts]:
    images.require("strace", "qemu-img", "cryptsetup")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        for name in ("VIRT_SSE_ROOT", "LIBVIRT_DEFAULT_URI"):
            patch.setenv(name, "")  # restored afterwards
        yield Attempts(FileSite(tmp_path_factory.mktemp("soak"), stack))


@pytest.fixture(scope="module")
def vault_attempts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VaultAttempts]:
    images.require("strace")
    with contextlib.ExitStack() as stack:
        yield VaultAttempts(VaultSite(tmp_path_factory.mktemp("vault"), stack))


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_a_killed_operation_leaves_what_the_next_command_understands(attempts: Attempts, name: str) -> None:
    (operation,) = (each for each in OPERATIONS if each.name == name)
    result = attempts(operation, seed=2)
    assert isinstance(result, Outcome), str(result)


@pytest.mark.slow
@pytest.mark.parametrize("planted", ["var/lib/virt-sse/.root.key.0123", "var/lib/libvirt/images/plain"])
def test_the_soak_finds_what_a_kill_leaves(attempts: Attempts, planted: str) -> None:
    """Files that the next command does not remove, and plaintext."""
    (operation,) = (each for each in OPERATIONS if each.name == FEW[0])

    def prepare(site: FileSite) -> None:
        operation.prepare(site)
        (site.root / planted).write_bytes(PATTERN)

    broken = FileOperation("planted", prepare, operation.arguments, operation.check)
    result = attempts(broken, seed=1)
    assert isinstance(result, Failure)
    assert "planted" in str(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vault-key-delete-server", "vault-key-rotate-client"])
def test_a_killed_vault_or_client_keeps_acknowledged_changes(
    vault_attempts: VaultAttempts, name: str
) -> None:
    (operation,) = (each for each in VAULT_OPERATIONS if each.name == name)
    result = vault_attempts(operation, seed=2)
    assert isinstance(result, Outcome), str(result)


@pytest.mark.slow
def test_the_soak_finds_a_lost_change(vault_attempts: VaultAttempts) -> None:
    (operation,) = (each for each in VAULT_OPERATIONS if each.name == "vault-key-disable-client")
    measured = vault_attempts(operation, seed=1)
    assert isinstance(measured, Outcome), str(measured)
    lost = dataclasses.replace(operation, arguments=lambda site: ["key", "show", site.subject.name])
    result = vault_attempts(lost, seed=1, at=KillPoint(KillBy.TIME, 60))
    assert isinstance(result, Failure)
    assert "AssertionError" in result.error
    assert "++" in result.error


def test_kill_points_are_repeatable_and_cover_the_operation() -> None:
    measured = Measured(0.5, 2.0, ("write", "fsync", "write", "rename"))
    points = [KillPoint.choose(Random(seed), measured) for seed in range(400)]  # noqa: S311 -- a seed
    assert points == [KillPoint.choose(Random(seed), measured) for seed in range(400)]  # noqa: S311
    by_call = {(point.call, point.at) for point in points if point.by is KillBy.CALL}
    assert by_call == {("write", 1), ("fsync", 1), ("write", 2), ("rename", 1)}
    assert all(0.5 <= point.at <= 2.0 for point in points if point.by is KillBy.TIME)
    assert [KillPoint.parse(str(point)) for point in points] == points

"""The platform-managed provider through rotations, provisionings, full disks and kills; known answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import UUID

import pytest

import virt_sse.system.files
from support import folders
from support.faults import STEP, dies_at, no_file_beyond
from support.keyrings import CONTEXT, files, open_provider, wrap
from virt_sse import errors
from virt_sse.errors import KeyNotFoundError, KeyringError, VirtSseError
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyState, WrappedDek
from virt_sse_plugins.key_providers import platform_keyring, platform_keyring_folder
from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider

VECTORS = json.loads((folders.VECTORS / "platform_managed.json").read_text("utf-8"))
WRITERS = (platform_keyring, platform_keyring_folder, virt_sse.system.files)


def test_a_version_of_another_host_is_unknown(provider: PlatformManagedKeyProvider, tmp_path: Path) -> None:
    other = open_provider(tmp_path / "other")
    other.provision()
    wrapped = wrap(other, Dek.generate())
    with pytest.raises(KeyNotFoundError) as caught:
        provider.unwrap(wrapped, context=CONTEXT)
    keyring_id = json.loads((tmp_path / "platform-managed/keyring.json").read_text("utf-8"))["id"]
    assert str(caught.value) == (
        f"the platform's keyring {keyring_id} has no version {wrapped.key.version!r} of key 'default'"
    )
    assert "another host's" in (caught.value.hint or "")


def test_a_full_disk_leaves_the_keyring_whole(provider: PlatformManagedKeyProvider, directory: Path) -> None:
    dek = Dek.generate()
    wrapped = wrap(provider, dek)
    before = files(directory)
    with no_file_beyond(100), pytest.raises(KeyringError, match=r"cannot write .*: File too large"):
        provider.rotate("default")
    assert files(directory) == before
    assert provider.current_key("default") == wrapped.key
    assert provider.unwrap(wrapped, context=CONTEXT) == dek


def test_provision_on_a_full_disk_can_be_run_again(directory: Path) -> None:
    with no_file_beyond(100), pytest.raises(KeyringError, match=r"cannot write .*: File too large"):
        open_provider(directory).provision()
    with pytest.raises(KeyringError, match="the platform's keyring is missing"):
        open_provider(directory).current_key("default")
    assert open_provider(directory).provision()
    assert sorted(files(directory)) == ["keyring.json", "root.key"]


def test_rotations_of_threads_and_processes_at_once_lose_nothing(
    provider: PlatformManagedKeyProvider, directory: Path
) -> None:
    script = (
        "import sys, pathlib; from virt_sse.model.keys import ProviderConfig\n"
        "from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider\n"
        "provider = PlatformManagedKeyProvider.from_config(ProviderConfig(pathlib.Path(sys.argv[1])))\n"
        "for _ in range(20): print(provider.rotate('default').version)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, directory], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    with ThreadPoolExecutor(4) as pool:
        made = [key.version for key in pool.map(provider.rotate, ["default"] * 40)]
    for process in processes:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        made += output.split()
    assert len(set(made)) == 100
    for version in made:
        assert provider.key_state(KeyId("platform-managed", "default", version)) is KeyState.ENABLED
    assert provider.current_key("default").version in made


@pytest.mark.slow
def test_a_kill_anywhere_in_a_rotation_leaves_the_keyring_whole(
    provider: PlatformManagedKeyProvider, directory: Path, tmp_path: Path
) -> None:
    dek = Dek.generate()
    first = wrap(provider, dek)
    shutil.copytree(directory, tmp_path / "before")
    line, outcomes = 1 - STEP, set()
    killed = True
    while killed:
        line += STEP
        shutil.rmtree(directory)
        shutil.copytree(tmp_path / "before", directory)
        killed = dies_at(line, WRITERS, lambda: open_provider(directory).rotate("default"))
        rotated = provider.current_key("default") != first.key
        outcomes.add((killed, rotated))
        assert provider.unwrap(first, context=CONTEXT) == dek
        assert provider.unwrap(wrap(provider, dek), context=CONTEXT) == dek
        provider.rotate("default")
        assert sorted(files(directory)) == ["keyring.json", "root.key"]
    assert outcomes == {(True, False), (True, True), (False, True)}


@pytest.mark.slow
def test_a_kill_anywhere_in_provisioning_is_mended_by_the_next(directory: Path) -> None:
    dek = Dek.generate()
    line, left = 0, set()
    killed = True
    while killed:
        line += 1
        shutil.rmtree(directory, ignore_errors=True)
        killed = dies_at(line, WRITERS, lambda: open_provider(directory).provision())
        provider = open_provider(directory)
        there = frozenset(name for name in files(directory) if name[0] != ".") if directory.exists() else None
        left.add(there)
        assert provider.provision() is (there is None or "root.key" not in there)
        assert provider.unwrap(wrap(provider, dek), context=CONTEXT) == dek
        assert sorted(files(directory)) == ["keyring.json", "root.key"]
    assert left == {
        None,
        frozenset(),
        frozenset({"root.key.new"}),
        frozenset({"root.key.new", "keyring.json"}),
        frozenset({"root.key", "keyring.json"}),
    }


@pytest.fixture
def vector_provider(directory: Path) -> PlatformManagedKeyProvider:
    directory.mkdir(0o700)
    for name, content in (
        ("root.key", bytes.fromhex(VECTORS["root-key"])),
        ("keyring.json", json.dumps(VECTORS["keyring"]).encode()),
    ):
        virt_sse.system.files.write_private(directory / name, content)
    return open_provider(directory)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=lambda case: case["name"])
def test_the_vectors_unwrap_as_recorded(
    vector_provider: PlatformManagedKeyProvider, case: dict[str, str]
) -> None:
    wrapped = WrappedDek(bytes.fromhex(case["ciphertext"]), case["algorithm"], KeyId(*case["key"]))
    context = DekContext(UUID(case["disk-id"]), case["slot"])
    if case["outcome"] == "ok":
        assert vector_provider.unwrap(wrapped, context=context) == Dek(bytes.fromhex(VECTORS["dek"]))
    else:
        with pytest.raises(VirtSseError) as caught:
            vector_provider.unwrap(wrapped, context=context)
        assert type(caught.value) is getattr(errors, case["outcome"])


def test_a_recorded_keyring_is_read_and_rotated(vector_provider: PlatformManagedKeyProvider) -> None:
    assert vector_provider.current_key("default").version == VECTORS["current"]
    assert not vector_provider.provision()
    rotated = vector_provider.rotate("default")
    assert vector_provider.key_state(rotated) is KeyState.ENABLED
    assert vector_provider.unwrap(wrap(vector_provider, Dek(bytes(32))), context=CONTEXT) == Dek(bytes(32))

"""The platform-managed provider's files: made privately; refused when missing, foreign, damaged or open."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.keyrings import CONTEXT, files, open_provider, wrap
from virt_sse.errors import ConfigError, KeyringError
from virt_sse.model.keys import Dek, KeyId, KeyState, ProviderConfig, WrappedDek
from virt_sse_plugins.key_providers.platform_keyring_folder import KeyringFolder
from virt_sse_plugins.key_providers.platform_managed import PlatformManagedKeyProvider


def edit(directory: Path, change: Callable[[dict[str, object]], object]) -> None:
    """Change the keyring as an operator with an editor would."""
    path = directory / "keyring.json"
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def assert_every_use_is_refused(directory: Path, message: str) -> KeyringError:
    """Every operation says so, and none changes a file."""
    before = files(directory) if directory.is_dir() else {}
    provider = open_provider(directory)
    key = KeyId("platform-managed", "default", "0" * 32)
    assert provider.key_state(key) is KeyState.UNREACHABLE
    calls: list[Callable[[], object]] = [
        lambda: provider.current_key("default"),
        lambda: provider.wrap(Dek.generate(), key, context=CONTEXT),
        lambda: provider.unwrap(WrappedDek(bytes(72), "A256KW", key), context=CONTEXT),
        lambda: provider.rotate("default"),
        lambda: provider.disable(key),
    ]
    for call in calls:
        with pytest.raises(KeyringError, match=message) as caught:
            call()
    assert before == (files(directory) if directory.is_dir() else {})
    return caught.value


def test_provision_makes_private_files_once(directory: Path) -> None:
    provider = open_provider(directory)
    assert provider.provision()
    made = files(directory)
    assert sorted(made) == ["keyring.json", "root.key"]
    assert len(made["root.key"]) == 32
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    assert not provider.provision()
    assert files(directory) == made


def test_making_the_provider_touches_nothing(directory: Path) -> None:
    open_provider(directory)
    assert not directory.exists()
    with pytest.raises(ConfigError, match="takes no options, not 'folder'"):
        PlatformManagedKeyProvider.from_config(ProviderConfig(directory, {"folder": "/etc"}))


def test_the_keyring_holds_no_kek_in_the_clear(provider: PlatformManagedKeyProvider, directory: Path) -> None:
    provider.rotate("default")
    content = json.loads((directory / "keyring.json").read_text("utf-8"))
    keyring = KeyringFolder(directory).read()
    assert len(content["keys"]["default"]["versions"]) == 2
    for version_id, version in content["keys"]["default"]["versions"].items():
        kek = keyring.kek("default", version_id)
        assert len(version_id) == len(kek) == 32
        assert version["created"].endswith("+00:00")
        stored = base64.b64decode(version["wrapped-kek"])
        assert len(stored) == 72
        assert kek not in stored


def test_the_root_key_does_not_show(provider: PlatformManagedKeyProvider, directory: Path) -> None:
    material = (directory / "root.key").read_bytes()
    keyring = KeyringFolder(directory).read()
    assert repr(material)[2:-1] not in repr(keyring)
    for value in (keyring, keyring.root_key, provider):
        with pytest.raises(TypeError):
            pickle.dumps(value)


def test_provision_of_two_at_once_makes_one_keyring(directory: Path) -> None:
    start = threading.Barrier(8)

    def provision(_: int) -> bool:
        start.wait()
        return open_provider(directory).provision()

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(provision, range(8)))
    assert made.count(True) == 1
    assert (
        len(json.loads((directory / "keyring.json").read_text("utf-8"))["keys"]["default"]["versions"]) == 1
    )


def test_a_missing_keyring_is_refused_and_unreachable(
    provider: PlatformManagedKeyProvider, directory: Path, tmp_path: Path
) -> None:
    dek = Dek.generate()
    wrapped = wrap(provider, dek)
    directory.rename(tmp_path / "moved")
    with pytest.raises(KeyringError, match="the platform's keyring is missing"):
        provider.unwrap(wrapped, context=CONTEXT)
    assert provider.key_state(wrapped.key) is KeyState.UNREACHABLE
    error = assert_every_use_is_refused(directory, "the platform's keyring is missing")
    assert str(directory / "keyring.json") in str(error)
    assert "virt-sse host init" in (error.hint or "")
    assert not directory.exists()

    (tmp_path / "moved").rename(directory)
    assert provider.unwrap(wrapped, context=CONTEXT) == dek


@pytest.mark.parametrize(
    ("lost", "message"), [("keyring.json", "keyring is missing"), ("root.key", "root key of .* is missing")]
)
def test_one_lost_file_is_named_and_never_made_anew(
    provider: PlatformManagedKeyProvider, directory: Path, lost: str, message: str
) -> None:
    (directory / lost).unlink()
    error = assert_every_use_is_refused(directory, message)
    assert str(directory / lost) in str(error)
    with pytest.raises(KeyringError, match=message):
        provider.provision()
    assert not (directory / lost).exists()


def test_a_lost_root_key_is_not_replaced_by_a_leftover(
    provider: PlatformManagedKeyProvider, directory: Path
) -> None:
    (directory / "root.key").unlink()
    (directory / "root.key.new").write_bytes(bytes(32))
    with pytest.raises(KeyringError, match=r"root key of .* is missing"):
        provider.provision()
    assert not (directory / "root.key").exists()


@pytest.mark.usefixtures("provider")
def test_the_root_key_of_another_keyring_is_refused(directory: Path, tmp_path: Path) -> None:
    open_provider(tmp_path / "other").provision()
    shutil.copy(tmp_path / "other/root.key", directory / "root.key")
    assert_every_use_is_refused(directory, "the root key does not match the platform's keyring")


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_root_key_of_another_size_is_refused(directory: Path, size: int) -> None:
    (directory / "root.key").write_bytes(bytes(size))
    assert_every_use_is_refused(directory, f"the root key has {size} bytes instead of 32")


@pytest.mark.usefixtures("provider")
def test_a_keyring_truncated_to_any_length_is_refused(directory: Path) -> None:
    path = directory / "keyring.json"
    whole = path.read_bytes()
    for length in range(len(whole) - 1):  # the last byte is the final newline
        path.write_bytes(whole[:length])
        with pytest.raises(KeyringError, match="keyring is damaged"):
            open_provider(directory).current_key("default")
    path.write_bytes(b"")
    assert_every_use_is_refused(directory, "keyring is damaged")


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\xfd", b"null", b"[]", b'"text"', b"{}", b'{"format": "1"}', b'{"format": 1}']
    + [b"9" * 5000, b'{"format": ' + b"9" * 400 + b"}", b"[" * 100_000, b'{"format": "\\ud800"}'],
)
def test_a_file_that_is_no_keyring_is_refused(directory: Path, content: bytes) -> None:
    (directory / "keyring.json").write_bytes(content)
    assert_every_use_is_refused(directory, "keyring is damaged")


@pytest.mark.usefixtures("provider")
@pytest.mark.parametrize(
    ("member", "value", "message"),
    [
        ("current", "f" * 32, "the current version 'f+' is missing - at `\\$.keys"),
        ("current", None, "expected `str`, got `null` - at `\\$.keys\\[...\\].current`"),
        ("versions", [], "expected `object`, got `array` - at `\\$.keys\\[...\\].versions`"),
        ("versions", {"v": {}}, "object missing required field `created` - at `\\$.keys\\[...\\].versions"),
        (
            "versions",
            {"v": {"created": "", "state": "lost"}},
            "invalid enum value 'lost' - at `\\$.keys\\[...\\].versions\\[...\\].state",
        ),
        (
            "versions",
            {"v": {"created": "", "state": "denied", "wrapped-kek": ""}},
            "a version's state cannot be 'denied'",
        ),
        (
            "versions",
            {"v": {"created": "", "state": "enabled", "wrapped-kek": "?"}},
            "invalid base64 encoded string",
        ),
        ("comment", "", "object contains unknown field `comment`"),
    ],
)
def test_a_keyring_with_a_damaged_key_is_refused(
    directory: Path, member: str, value: object, message: str
) -> None:
    def damage(content: dict[str, object]) -> None:
        content["keys"]["default"][member] = value  # type: ignore[index]

    edit(directory, damage)
    assert_every_use_is_refused(directory, f"keyring is damaged: {message}")


@pytest.mark.usefixtures("provider")
def test_a_keyring_of_an_unknown_format_is_refused(directory: Path) -> None:
    edit(directory, lambda content: content.update(format=2))
    error = assert_every_use_is_refused(directory, "has format 2, this virt-sse reads 1")
    assert "upgrade" in (error.hint or "")


def test_a_damaged_kek_costs_its_own_version_only(
    provider: PlatformManagedKeyProvider, directory: Path
) -> None:
    dek = Dek.generate()
    first = wrap(provider, dek)
    provider.rotate("default")
    second = wrap(provider, dek)

    def swap(content: dict[str, object]) -> None:
        versions = content["keys"]["default"]["versions"]  # type: ignore[index]
        versions[first.key.version]["wrapped-kek"] = versions[second.key.version]["wrapped-kek"]

    edit(directory, swap)
    with pytest.raises(KeyringError, match=f"version '{first.key.version}' of key 'default' .* is damaged"):
        provider.unwrap(first, context=CONTEXT)
    assert provider.unwrap(second, context=CONTEXT) == dek

    def flip(content: dict[str, object]) -> None:
        version = content["keys"]["default"]["versions"][first.key.version]  # type: ignore[index]
        version["wrapped-kek"] = base64.b64encode(bytes(72)).decode()

    edit(directory, flip)
    with pytest.raises(KeyringError, match="is damaged"):
        provider.unwrap(first, context=CONTEXT)


@pytest.mark.parametrize(("name", "right"), [("", 0o700), ("root.key", 0o600), ("keyring.json", 0o600)])
@pytest.mark.parametrize("extra", [0o040, 0o020, 0o004, 0o002])
def test_files_open_to_other_users_are_refused(
    provider: PlatformManagedKeyProvider, directory: Path, name: str, right: int, extra: int
) -> None:
    dek = Dek.generate()
    wrapped = wrap(provider, dek)
    path = directory / name
    path.chmod(right | extra)
    with pytest.raises(KeyringError, match="accessible to other users"):  # also where it was read before
        provider.unwrap(wrapped, context=CONTEXT)
    error = assert_every_use_is_refused(directory, rf"accessible to other users \(mode {right | extra:04o}\)")
    assert error.hint == f"chmod {right:04o} {path}"
    path.chmod(right)
    assert provider.unwrap(wrapped, context=CONTEXT) == dek


@pytest.mark.usefixtures("as_root", "provider")
@pytest.mark.parametrize("name", ["", "root.key", "keyring.json"])
def test_files_of_another_user_are_refused(directory: Path, name: str) -> None:
    os.chown(directory / name, 65534, -1)
    error = assert_every_use_is_refused(directory, "belongs to user 65534, not to the current user 0")
    assert error.hint == f"chown 0 {directory / name}"


@pytest.mark.usefixtures("provider")
def test_a_folder_in_the_place_of_a_file_is_refused(directory: Path) -> None:
    (directory / "keyring.json").unlink()
    (directory / "keyring.json").mkdir(0o700)
    with pytest.raises(KeyringError, match=r"cannot read the platform's keyring .*: Is a directory"):
        open_provider(directory).current_key("default")


def test_a_file_in_the_place_of_the_folder_is_refused(directory: Path) -> None:
    directory.touch()
    with pytest.raises(KeyringError, match=r"cannot write the platform's keyring .*: File exists"):
        open_provider(directory).provision()
    assert_every_use_is_refused(directory, "cannot read the platform's keyring .*: Not a directory")

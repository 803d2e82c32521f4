"""The hsm-simulated provider, beside what the contract says of all providers."""

from __future__ import annotations

import dataclasses
import secrets
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import inside_token
from support.forking import Report, fork
from support.inside_token import inside
from virt_sse.errors import (
    ConfigError,
    InvalidValueError,
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    UnwrapError,
    VirtSseError,
)
from virt_sse.lab.tokens import LabToken
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyState, ProviderConfig
from virt_sse.pkcs11.token import KeyKind
from virt_sse.pkcs11.versions import VersionedKeys
from virt_sse.system.files import write_private
from virt_sse_plugins.key_providers.hsm_simulated import HsmSimulatedKeyProvider

CONTEXT = DekContext(uuid.uuid4(), "service")
DEK = Dek.generate()

Open = Callable[..., HsmSimulatedKeyProvider]


@pytest.fixture
def open_provider(lab_token: LabToken, tmp_path: Path) -> Iterator[Open]:
    """The provider with the options of a lab token, but for those that are given."""
    opened = []

    def open_one(**options: object) -> HsmSimulatedKeyProvider:
        config = ProviderConfig(tmp_path / "hsm", {**lab_token.options, **options})
        opened.append(HsmSimulatedKeyProvider.from_config(config))
        return opened[-1]

    yield open_one
    for provider in opened:
        provider.close()


@pytest.fixture
def provider(open_provider: Open) -> HsmSimulatedKeyProvider:
    return open_provider()


@pytest.fixture
def keys(provider: HsmSimulatedKeyProvider) -> VersionedKeys:
    """The administrator's."""
    return provider.keys()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("disks", ("disks", None)),
        ("a/b:c", ("a/b:c", None)),
        ("pkcs11:object=my%20disks", ("my disks", None)),
        ("pkcs11:object=disks;id=%01%FF;type=private", ("disks", "01ff")),
    ],
)
def test_keys_are_named_by_label_or_uri(text: str, key: tuple[str, str | None]) -> None:
    assert HsmSimulatedKeyProvider.parse_key(text) == key


@pytest.mark.parametrize(
    "text",
    [
        "pkcs11:",
        "pkcs11:id=%01",
        "pkcs11:object=a;token=t",
        "pkcs11:object=a;type=cert",
        "pkcs11:object=a?pin-value=1",
    ],
)
def test_a_uri_that_names_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidValueError):
        HsmSimulatedKeyProvider.parse_key(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pin": "1234"}, "unknown option 'pin'"),
        ({"uri": 1}, "must be a string"),
        ({"uri": "token=a"}, "must begin with"),
        ({"uri": "pkcs11:?pin-source=/x"}, "does not name a token"),
        ({"uri": "pkcs11:token=a;object=k"}, "not a key inside"),
        ({"uri": "pkcs11:token=a?pin-value=1"}, "may not hold a PIN"),
        ({"uri": "pkcs11:token=a?pin-source=|cat"}, "not from a program"),
        ({"uri": "pkcs11:token=a?pin-source=/x", "pin-file": "/y"}, "more than once"),
        ({"uri": "pkcs11:token=a?module-path=/x", "module": "/y"}, "more than once"),
        ({"module": "lib/x.so"}, "absolute path"),
        ({"pin-file": "pin"}, "absolute path"),
        ({"softhsm-config": "softhsm2.conf"}, "absolute path"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        HsmSimulatedKeyProvider.from_config(ProviderConfig(tmp_path, options))


def test_the_provider_needs_no_identity(tmp_path: Path) -> None:
    assert not HsmSimulatedKeyProvider.needs_identity(ProviderConfig(tmp_path))


def test_the_uri_may_name_module_and_pin(open_provider: Open, lab_token: LabToken, tmp_path: Path) -> None:
    uri = dataclasses.replace(
        lab_token.uri, module_name="softhsm2", pin_source=f"file:{lab_token.folder.pin}"
    )
    options = {"uri": str(uri), "softhsm-config": lab_token.options["softhsm-config"]}
    provider = HsmSimulatedKeyProvider.from_config(ProviderConfig(tmp_path / "other", options))
    provider.keys().create("key", KeyKind.AES, 0)
    assert open_provider().current_key("key") == provider.current_key("key")
    provider.close()


def test_every_state_of_a_key_is_seen(provider: HsmSimulatedKeyProvider, keys: VersionedKeys) -> None:
    made = keys.create("key", KeyKind.RSA, 2048)
    key = provider.current_key("key")
    wrapped = provider.wrap(DEK, key, context=CONTEXT)
    assert provider.key_state(key) is KeyState.ENABLED
    keys.token.set_enabled(made, False)
    assert provider.key_state(key) is KeyState.DISABLED
    keys.token.set_enabled(made, True)
    assert provider.unwrap(wrapped, context=CONTEXT) == DEK
    keys.token.destroy(made)
    assert provider.key_state(key) is KeyState.DELETED
    for use in (
        lambda: provider.wrap(DEK, key, context=CONTEXT),
        lambda: provider.unwrap(wrapped, context=CONTEXT),
        lambda: provider.current_key("key"),
        lambda: provider.rotate("key"),
    ):
        with pytest.raises(KeyNotFoundError):
            use()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"module": "/no/such/module.so"},
        {"module": "no-such-module"},
        {"module": "/etc/passwd"},
        {"uri": "pkcs11:token=none"},
        {"uri": "pkcs11:model=SoftHSM%20v2;serial=0"},
        {"pin-file": "/no/such/pin"},
        {"pin-file": "wrong"},
        {"softhsm-config": "/no/such/softhsm2.conf"},
    ],
    ids=lambda options: next(iter(options.values())),
)
def test_an_unreachable_token_is_no_verdict(
    open_provider: Open, keys: VersionedKeys, options: dict[str, object], tmp_path: Path
) -> None:
    keys.create("key", KeyKind.AES, 0)
    key = open_provider().current_key("key")
    wrapped = open_provider().wrap(DEK, key, context=CONTEXT)
    if options.get("pin-file") == "wrong":
        write_private(tmp_path / "pin", b"0000")
        options = {"pin-file": str(tmp_path / "pin")}
    provider = open_provider(**options)
    assert provider.key_state(key) is KeyState.UNREACHABLE
    for use in (
        lambda: provider.wrap(DEK, key, context=CONTEXT),
        lambda: provider.unwrap(wrapped, context=CONTEXT),
        lambda: provider.current_key("key"),
        lambda: provider.rotate("key"),
    ):
        with pytest.raises(VirtSseError) as caught:
            use()
        assert not isinstance(caught.value, KeyNotFoundError | KeyDisabledError | KeyDeniedError)
    assert open_provider().key_state(key) in (KeyState.ENABLED, KeyState.UNREACHABLE)


@pytest.mark.slow
def test_processes_that_rotate_at_once_agree(
    provider: HsmSimulatedKeyProvider, open_provider: Open, keys: VersionedKeys
) -> None:
    keys.create("key", KeyKind.AES, 0)

    def rotate(report: Report) -> None:
        for _ in range(3):
            report(provider.rotate("key").version)

    children = [fork(rotate) for _ in range(4)]
    made = [line for child in children for line in child.lines()]
    assert [child.wait() for child in children] == [0] * 4
    versions = [key.id.hex() for key in keys.versions("key")]
    assert sorted(made) == versions[1:]
    assert len(set(made)) == 12
    assert {open_provider().current_key("key").version for _ in range(3)} == {versions[-1]}
    after = provider.rotate("key")
    assert open_provider().current_key("key") == after
    for version in (*made, after.version):
        wrapped = provider.wrap(DEK, KeyId(provider.name, "key", version), context=CONTEXT)
        assert provider.unwrap(wrapped, context=CONTEXT) == DEK


def test_versions_made_by_other_programs_come_first(
    provider: HsmSimulatedKeyProvider, keys: VersionedKeys
) -> None:
    for key_id in (b"\2", b"\1", b"\1\0"):
        keys.token.generate_aes("key", key_id)
    assert provider.current_key("key").version == "0100"
    assert provider.key_state(KeyId(provider.name, "key", "01")) is KeyState.ENABLED
    assert provider.rotate("key") == provider.current_key("key")
    assert len(keys.versions("key")) == 4


def test_an_algorithm_belongs_to_a_kind_of_key(
    provider: HsmSimulatedKeyProvider, keys: VersionedKeys
) -> None:
    keys.create("rsa", KeyKind.RSA, 2048)
    keys.create("aes", KeyKind.AES, 0)
    by_rsa, by_aes = (
        provider.wrap(DEK, provider.current_key(name), context=CONTEXT) for name in ("rsa", "aes")
    )
    assert (by_rsa.algorithm, by_aes.algorithm) == ("RSA-OAEP-256", "A256KW")
    for wrapped, other in ((by_rsa, by_aes), (by_aes, by_rsa)):
        for wrong in (
            dataclasses.replace(wrapped, algorithm=other.algorithm),
            dataclasses.replace(wrapped, key=other.key),
        ):
            with pytest.raises(UnwrapError):
                provider.unwrap(wrong, context=CONTEXT)


def test_a_weak_key_made_by_another_program_wraps_nothing(
    provider: HsmSimulatedKeyProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside_token.allow(monkeypatch)
    keys = provider.keys()
    inside(keys.token, inside_token.make_weak, "weak")
    with pytest.raises(KeyOperationUnsupportedError, match="1024 bits"):
        provider.wrap(DEK, provider.current_key("weak"), context=CONTEXT)
    assert keys.rotate("weak").bits == 2048


def test_a_key_name_in_use_is_refused(keys: VersionedKeys) -> None:
    keys.create("key", KeyKind.AES, 0)
    with pytest.raises(InvalidValueError, match="already"):
        keys.create("key", KeyKind.RSA, 2048)


def test_a_version_has_one_spelling(provider: HsmSimulatedKeyProvider, keys: VersionedKeys) -> None:
    keys.token.generate_aes("key", b"\xab\xcd")
    assert provider.key_state(KeyId(provider.name, "key", "abcd")) is KeyState.ENABLED
    for version in ("ABCD", "ab cd", " abcd", "abc", "", secrets.token_hex(16)):
        assert provider.key_state(KeyId(provider.name, "key", version)) is KeyState.DELETED

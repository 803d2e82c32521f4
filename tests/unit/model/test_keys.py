from __future__ import annotations

import base64
import copy
import pickle
from uuid import UUID

import pytest

from virt_sse.errors import KeyOperationUnsupportedError, UnwrapError
from virt_sse.model.keys import (
    DEK_BYTES,
    Dek,
    DekContext,
    KeyId,
    KeyProvider,
    KeyRef,
    KeyState,
    ProviderConfig,
    WrappedDek,
)

DISK = UUID("00000000-0000-4000-8000-000000000001")
OTHER_DISK = UUID("00000000-0000-4000-8000-000000000002")


class KeylessProvider(KeyProvider):
    """Does only what the base class does."""

    name = "keyless"

    @classmethod
    def from_config(cls, config: ProviderConfig) -> KeylessProvider:
        return cls()

    def current_key(self, name: str) -> KeyId:
        raise NotImplementedError

    def wrap(self, dek: Dek, key: KeyId, *, context: DekContext) -> WrappedDek:
        raise NotImplementedError

    def unwrap(self, wrapped: WrappedDek, *, context: DekContext) -> Dek:
        raise NotImplementedError

    def key_state(self, key: KeyId) -> KeyState:
        return KeyState.UNREACHABLE


def test_generated_deks_differ_from_each_other() -> None:
    deks = [Dek.generate() for _ in range(100)]
    assert {len(dek.material) for dek in deks} == {DEK_BYTES}
    assert len({dek.material for dek in deks}) == 100


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_a_dek_of_another_size_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"32 bytes, not {length}"):
        Dek(bytes(length))


def test_a_dek_does_not_show() -> None:
    dek = Dek(b"seven words that nobody may read")
    for text in (repr(dek), str(dek), f"{dek}", repr([dek])):
        assert "words" not in text
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled"):
            copier(dek)


def test_deks_compare_by_material_and_do_not_hash() -> None:
    assert Dek(bytes(32)) == Dek(bytes(32))
    assert Dek(bytes(32)) != Dek(b"\1" + bytes(31))
    assert Dek(bytes(32)) != bytes(32)
    with pytest.raises(TypeError):
        hash(Dek(bytes(32)))


def test_the_passphrase_is_base64_text() -> None:
    dek = Dek(bytes(range(32)))
    assert dek.passphrase == b"AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    assert base64.b64decode(dek.passphrase) == dek.material


def test_keys_print_as_provider_name_and_version() -> None:
    assert str(KeyRef("platform-managed", "default")) == "platform-managed:default"
    assert str(KeyId("vault", "https://host:8443/disks", "7f")) == "vault:https://host:8443/disks:7f"


def test_the_context_digest_never_changes() -> None:
    digest = DekContext(DISK, "service").digest()
    assert digest.hex() == "5c07a327c6e81ea22eb44aa674038b42b8a5d7a5277105f2d005c742a2f43821"


@pytest.mark.parametrize(
    "other",
    [
        DekContext(OTHER_DISK, "service"),
        DekContext(DISK, "platform"),
        DekContext(DISK, ""),
        DekContext(DISK, "service\0"),
    ],
)
def test_a_payload_opens_for_its_own_context_only(other: DekContext) -> None:
    dek, context = Dek.generate(), DekContext(DISK, "service")
    payload = context.bind(dek)
    assert len(payload) == 64
    assert context.release(payload) == dek
    with pytest.raises(UnwrapError) as caught:
        other.release(payload)
    assert str(other.disk_id) in str(caught.value)
    assert dek.material.hex() not in str(caught.value)


@pytest.mark.parametrize("length", [0, 32, 63, 65, 96])
def test_a_payload_of_another_size_is_refused(length: int) -> None:
    context = DekContext(DISK, "service")
    payload = (context.bind(Dek.generate()) + bytes(64))[:length]
    with pytest.raises(UnwrapError):
        context.release(payload)


def test_optional_operations_of_a_provider_are_unsupported_by_default() -> None:
    provider = KeylessProvider()
    assert provider.provision() is False
    with pytest.raises(KeyOperationUnsupportedError, match="keyless"):
        provider.rotate("default")
    provider.close()

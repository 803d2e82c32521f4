"""Keys in real tokens, SoftHSM's and NSS's: what they do, and what becomes of them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from support import inside_token
from support.forking import run_forked
from support.inside_token import inside
from virt_sse.errors import (
    InvalidValueError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderUnavailableError,
    UnwrapError,
)
from virt_sse.lab.tokens import LabToken
from virt_sse.pkcs11.objects import KeyKind
from virt_sse.pkcs11.rsa_oaep import OaepMode
from virt_sse.pkcs11.token import Token, TokenKey

MESSAGE = b"m" * 64
OURS = rsa.generate_private_key(65537, 2048)
HASHES: dict[str, type[hashes.HashAlgorithm]] = {"sha1": hashes.SHA1, "sha256": hashes.SHA256}


@pytest.fixture(params=["lab_token", "lab_nss_token"])
def token(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Token]:
    inside_token.allow(monkeypatch)
    lab_token: LabToken = request.getfixturevalue(request.param)
    opened = lab_token.open()
    yield opened
    opened.close()


@pytest.fixture
def label() -> str:
    """A name that no other test has used: NSS's token is one for all."""
    return f"key-{secrets.token_hex(8)}"


@pytest.fixture
def rsa_key(token: Token, label: str) -> TokenKey:
    return token.generate_rsa(label, secrets.token_bytes(16), 2048)


@pytest.fixture
def aes_key(token: Token, label: str) -> TokenKey:
    return token.generate_aes(label, secrets.token_bytes(16))


def use(token: Token, key: TokenKey) -> bytes:
    """A round trip."""
    if key.kind is KeyKind.AES:
        return token.aes_unwrap(key, token.aes_wrap(key, MESSAGE))
    return token.oaep_decrypt(key, token.oaep_encrypt(key, MESSAGE, "sha256"), "sha256")


def test_a_key_is_made_inside_and_stays_there(token: Token, rsa_key: TokenKey, aes_key: TokenKey) -> None:
    for key in (rsa_key, aes_key):
        assert key.is_never_extractable
        assert not key.is_extractable
        assert key.is_enabled
        assert inside(token, inside_token.look_at_secret, key) == [None]
    assert rsa_key.bits == rsa_key.public_key.key_size == 2048
    assert aes_key.bits == 256
    with pytest.raises(ValueError, match="no public half"):
        _ = aes_key.public_key
    assert {rsa_key, aes_key} <= set(token.find())
    assert token.find(label=rsa_key.label, id=rsa_key.id) == [rsa_key]


@pytest.mark.parametrize("hash_name", HASHES)
def test_oaep_agrees_with_other_implementations(token: Token, rsa_key: TokenKey, hash_name: str) -> None:
    algorithm = HASHES[hash_name]()
    theirs = rsa_key.public_key.encrypt(MESSAGE, padding.OAEP(padding.MGF1(algorithm), algorithm, label=None))
    assert token.oaep_decrypt(rsa_key, theirs, hash_name) == MESSAGE
    imported = token.import_rsa(OURS, rsa_key.label, secrets.token_bytes(16))
    ours = token.oaep_encrypt(imported, MESSAGE, hash_name)
    assert OURS.decrypt(ours, padding.OAEP(padding.MGF1(algorithm), algorithm, label=None)) == MESSAGE
    token.destroy(imported)


def test_the_place_of_oaep_is_found_by_trying(
    lab_token: LabToken, lab_nss_token: LabToken, label: str
) -> None:
    modes = []
    for each in (lab_token, lab_nss_token):
        token = each.open()
        key = token.generate_rsa(label, secrets.token_bytes(16), 2048)
        for hash_name in HASHES:
            assert token.oaep_decrypt(key, token.oaep_encrypt(key, b"", hash_name), hash_name) == b""
        modes.append(token.oaep_modes())
        token.close()
    assert modes[0] == {"sha1": OaepMode.TOKEN, "sha256": OaepMode.HOST}, "SoftHSM has learnt something"
    assert modes[1] == {"sha1": OaepMode.TOKEN, "sha256": OaepMode.TOKEN}


def test_an_imported_key_cannot_be_taken_out(token: Token, label: str) -> None:
    key = token.import_rsa(OURS, label, secrets.token_bytes(16))
    assert key.n == OURS.public_key().public_numbers().n
    assert not key.is_extractable
    assert not key.is_never_extractable, "it was outside once"
    assert use(token, key) == MESSAGE
    token.destroy(key)


@pytest.mark.parametrize("hash_name", HASHES)
def test_every_wrong_oaep_ciphertext_has_the_same_error(
    token: Token, rsa_key: TokenKey, hash_name: str
) -> None:
    whole = token.oaep_encrypt(rsa_key, MESSAGE, hash_name)
    other = token.oaep_encrypt(rsa_key, MESSAGE, "sha1" if hash_name == "sha256" else "sha256")
    damaged = [b"", whole[:-1], whole + b"\0", bytes(256), bytes(255) + b"\1", b"\xff" * 256, other]
    damaged += [
        whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :] for position in (0, 9, 255)
    ]
    said = set()
    for ciphertext in damaged:
        with pytest.raises(UnwrapError) as caught:
            token.oaep_decrypt(rsa_key, ciphertext, hash_name)
        said.add((str(caught.value), caught.value.hint, type(caught.value.__cause__)))
    assert len(said) == 1
    assert token.oaep_decrypt(rsa_key, whole, hash_name) == MESSAGE


def test_every_wrong_aes_ciphertext_has_the_same_error(token: Token, aes_key: TokenKey) -> None:
    whole = token.aes_wrap(aes_key, MESSAGE)
    assert len(whole) == len(MESSAGE) + 8
    said = set()
    for wrapped in (
        b"",
        whole[:-8],
        whole[:-1],
        whole + bytes(8),
        bytes(72),
        bytes([whole[0] ^ 1]) + whole[1:],
    ):
        with pytest.raises(UnwrapError) as caught:
            token.aes_unwrap(aes_key, wrapped)
        said.add((str(caught.value), caught.value.hint, type(caught.value.__cause__)))
    assert len(said) == 1
    assert token.aes_unwrap(aes_key, whole) == MESSAGE
    with pytest.raises(InvalidValueError):
        token.aes_wrap(aes_key, b"x" * 17)


def test_a_key_serves_its_own_purpose_alone(token: Token, rsa_key: TokenKey, aes_key: TokenKey) -> None:
    with pytest.raises(KeyOperationUnsupportedError):
        token.aes_wrap(rsa_key, MESSAGE)
    with pytest.raises(KeyOperationUnsupportedError):
        token.oaep_encrypt(aes_key, MESSAGE, "sha256")
    with pytest.raises(InvalidValueError, match="sha512"):
        token.oaep_encrypt(rsa_key, MESSAGE, "sha512")


def test_a_key_disabled_in_another_process_is_refused(
    token: Token, rsa_key: TokenKey, aes_key: TokenKey
) -> None:
    for key in (rsa_key, aes_key):
        assert use(token, key) == MESSAGE
        assert run_forked(lambda key=key: token.set_enabled(key, False)) == 0  # type: ignore[misc]
        assert not token.is_enabled(key)
        with pytest.raises(KeyDisabledError):
            use(token, key)
        token.set_enabled(key, True)
        assert use(token, key) == MESSAGE


def test_a_disabled_key_does_not_decrypt(token: Token, rsa_key: TokenKey) -> None:
    ciphertext = token.oaep_encrypt(rsa_key, MESSAGE, "sha256")
    token.set_enabled(rsa_key, False)
    with pytest.raises(KeyDisabledError):
        token.oaep_decrypt(rsa_key, ciphertext, "sha256")


@pytest.mark.slow
def test_a_key_destroyed_in_another_process_is_not_found(
    token: Token, rsa_key: TokenKey, aes_key: TokenKey
) -> None:
    for key in (rsa_key, aes_key):
        assert use(token, key) == MESSAGE
        assert run_forked(lambda key=key: token.destroy(key)) == 0  # type: ignore[misc]
        for work in (use, Token.is_enabled, Token.destroy):
            with pytest.raises(KeyNotFoundError):
                work(token, key)
        assert token.find(label=key.label, id=key.id) == []


def test_another_key_of_the_same_name_is_not_used(token: Token, rsa_key: TokenKey) -> None:
    assert use(token, rsa_key) == MESSAGE

    def replace() -> None:
        token.destroy(rsa_key)
        token.generate_rsa(rsa_key.label, rsa_key.id, 2048)

    assert run_forked(replace) == 0
    with pytest.raises(KeyNotFoundError):
        use(token, rsa_key)


def test_two_keys_of_the_same_name_are_refused(
    lab_token: LabToken, label: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside_token.allow(monkeypatch)
    with closing(lab_token.open()) as token:
        key = token.generate_aes(label, b"\1")
        inside(token, inside_token.make_another, key)
    with (
        closing(lab_token.open()) as fresh,
        pytest.raises(KeyProviderUnavailableError, match="holds 2 keys"),
    ):
        fresh.aes_wrap(key, MESSAGE)


def test_invalid_names_and_sizes_are_refused(token: Token, label: str) -> None:
    weak = rsa.generate_private_key(65537, 1024)  # noqa: S505 -- it is refused
    for wrong in ("", "a\0b", "a\nb", "x" * 256):
        with pytest.raises(InvalidValueError):
            token.generate_aes(wrong, b"\1")
    with pytest.raises(InvalidValueError, match="needs an id"):
        token.generate_aes(label, b"")
    with pytest.raises(InvalidValueError, match="2048, 3072 or 4096"):
        token.generate_rsa(label, b"\1", 1024)
    with pytest.raises(InvalidValueError, match="2048, 3072 or 4096"):
        token.import_rsa(weak, label, b"\1")
    assert token.find(label=label) == []


def test_a_name_is_taken_once(token: Token, aes_key: TokenKey) -> None:
    with pytest.raises(InvalidValueError, match="already"):
        token.generate_aes(aes_key.label, aes_key.id)
    assert len(token.find(label=aes_key.label)) == 1


def test_a_label_is_not_cut_off_at_a_nul(token: Token, aes_key: TokenKey) -> None:
    assert token.find(label=aes_key.label + "\0x") == []


@pytest.mark.parametrize("label", ["Schlüssel/größer", "鍵", "a:b;c=d?e"])
def test_labels_of_all_kinds_are_found_again(lab_token: LabToken, label: str) -> None:
    token = lab_token.open()
    key = token.generate_aes(label, b"\1")
    assert token.find(label=label) == [key]
    assert use(token, key) == MESSAGE
    token.close()

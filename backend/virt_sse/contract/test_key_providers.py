"""The contract of :class:`virt_sse.model.keys.KeyProvider`, tested on one provider."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import pickle
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from virt_sse.contract import KeyProviderBench
from virt_sse.contract.fixtures import *  # noqa: F403 -- fixtures; projects import all of this module in turn
from virt_sse.errors import (
    ConfigError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    UnwrapError,
)
from virt_sse.model.keys import Dek, DekContext, KeyId, KeyProvider, KeyState, WrappedDek

OpenProvider = Callable[..., KeyProvider]
InOtherProcess = Callable[[WrappedDek, DekContext], WrappedDek]


def test_a_provider_has_the_name_it_is_registered_under(
    provider: KeyProvider, bench: KeyProviderBench
) -> None:
    assert provider.name == bench.provider


def test_a_wrapped_dek_unwraps_to_the_same_dek(
    provider: KeyProvider, bench: KeyProviderBench, dek: Dek, context: DekContext
) -> None:
    key = provider.current_key(bench.key)
    assert (key.provider, key.name) == (provider.name, bench.key)
    assert key.version
    assert ":" not in key.version
    assert provider.key_state(key) is KeyState.ENABLED

    wrapped = provider.wrap(dek, key, context=context)
    assert wrapped.key == key
    assert wrapped.algorithm
    assert dek.material not in wrapped.ciphertext
    assert provider.unwrap(wrapped, context=context) == dek


def test_a_dek_moved_to_another_disk_does_not_unwrap(
    provider: KeyProvider, wrapped: WrappedDek, context: DekContext
) -> None:
    with pytest.raises(UnwrapError):
        provider.unwrap(wrapped, context=dataclasses.replace(context, disk_id=uuid.uuid4()))


@pytest.mark.parametrize("slot", ["platform", "Service", "service ", ""])
def test_a_dek_moved_to_another_slot_does_not_unwrap(
    provider: KeyProvider, wrapped: WrappedDek, context: DekContext, slot: str
) -> None:
    with pytest.raises(UnwrapError):
        provider.unwrap(wrapped, context=dataclasses.replace(context, slot=slot))


@pytest.mark.slow
def test_a_wrapped_dek_with_any_flipped_byte_is_refused(
    provider: KeyProvider, wrapped: WrappedDek, context: DekContext
) -> None:
    for position in range(len(wrapped.ciphertext)):
        flipped = bytearray(wrapped.ciphertext)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(UnwrapError):
            provider.unwrap(dataclasses.replace(wrapped, ciphertext=bytes(flipped)), context=context)


@pytest.mark.slow
def test_a_wrapped_dek_of_any_wrong_length_is_refused(
    provider: KeyProvider, wrapped: WrappedDek, context: DekContext
) -> None:
    whole = wrapped.ciphertext
    longer = [whole + bytes(1), whole + bytes(8), bytes(8) + whole, whole + whole]
    for ciphertext in [*(whole[:length] for length in range(len(whole))), *longer]:
        with pytest.raises(UnwrapError):
            provider.unwrap(dataclasses.replace(wrapped, ciphertext=ciphertext), context=context)


@pytest.mark.parametrize("algorithm", ["", "none", "dir", "A128KW", "RSA1_5", "a256kw", "rsa-oaep-256"])
def test_a_wrapped_dek_of_another_algorithm_is_refused(
    provider: KeyProvider, wrapped: WrappedDek, context: DekContext, algorithm: str
) -> None:
    with pytest.raises(UnwrapError):
        provider.unwrap(dataclasses.replace(wrapped, algorithm=algorithm), context=context)


def test_rotation_is_seen_at_once_and_older_versions_still_work(
    provider: KeyProvider, bench: KeyProviderBench, dek: Dek, wrapped: WrappedDek, context: DekContext
) -> None:
    bench.rotate()
    current = provider.current_key(bench.key)
    assert current.version != wrapped.key.version
    assert provider.key_state(wrapped.key) is KeyState.ENABLED
    assert provider.unwrap(wrapped, context=context) == dek
    for key in (current, wrapped.key):
        again = provider.wrap(dek, key, context=context)
        assert again.key == key
        assert provider.unwrap(again, context=context) == dek


def test_rotation_by_the_provider_does_the_same_or_is_unsupported(
    provider: KeyProvider, bench: KeyProviderBench, dek: Dek, wrapped: WrappedDek, context: DekContext
) -> None:
    try:
        rotated = provider.rotate(bench.key)
    except KeyOperationUnsupportedError:
        assert provider.current_key(bench.key) == wrapped.key
    else:
        assert rotated != wrapped.key
        assert provider.current_key(bench.key) == rotated
        with pytest.raises(KeyNotFoundError):
            provider.rotate("no-such-key")
    assert provider.unwrap(wrapped, context=context) == dek


def test_another_version_of_the_key_does_not_unwrap(
    provider: KeyProvider, bench: KeyProviderBench, wrapped: WrappedDek, context: DekContext
) -> None:
    bench.rotate()
    with pytest.raises(UnwrapError):
        provider.unwrap(dataclasses.replace(wrapped, key=provider.current_key(bench.key)), context=context)


@pytest.mark.parametrize("version", ["no-such-version", "f" * 32, "0", "../1", "\u0661", ""])
def test_an_unknown_version_is_deleted_and_not_found(
    provider: KeyProvider, dek: Dek, wrapped: WrappedDek, context: DekContext, version: str
) -> None:
    key = dataclasses.replace(wrapped.key, version=version)
    assert provider.key_state(key) is KeyState.DELETED
    with pytest.raises(KeyNotFoundError):
        provider.wrap(dek, key, context=context)
    with pytest.raises(KeyNotFoundError):
        provider.unwrap(dataclasses.replace(wrapped, key=key), context=context)


@pytest.mark.parametrize("name", ["no-such-key", "*", "../default", ""])
def test_an_unknown_key_name_is_deleted_and_not_found(
    provider: KeyProvider, dek: Dek, wrapped: WrappedDek, context: DekContext, name: str
) -> None:
    key = dataclasses.replace(wrapped.key, name=name)
    assert provider.key_state(key) is KeyState.DELETED
    with pytest.raises(KeyNotFoundError):
        provider.current_key(name)
    with pytest.raises(KeyNotFoundError):
        provider.wrap(dek, key, context=context)
    with pytest.raises(KeyNotFoundError):
        provider.unwrap(dataclasses.replace(wrapped, key=key), context=context)


def test_a_disabled_version_neither_wraps_nor_unwraps(
    provider: KeyProvider, bench: KeyProviderBench, dek: Dek, wrapped: WrappedDek, context: DekContext
) -> None:
    if bench.disable is None or bench.enable is None:
        pytest.skip(f"the keys of {provider.name!r} cannot be disabled")
    bench.rotate()
    bench.disable(wrapped.key)
    assert provider.key_state(wrapped.key) is KeyState.DISABLED
    with pytest.raises(KeyDisabledError):
        provider.wrap(dek, wrapped.key, context=context)
    with pytest.raises(KeyDisabledError):
        provider.unwrap(wrapped, context=context)

    current = provider.current_key(bench.key)
    assert provider.key_state(current) is KeyState.ENABLED
    assert provider.unwrap(provider.wrap(dek, current, context=context), context=context) == dek

    bench.enable(wrapped.key)
    assert provider.key_state(wrapped.key) is KeyState.ENABLED
    assert provider.unwrap(wrapped, context=context) == dek


def test_no_repr_and_no_error_shows_key_material(
    provider: KeyProvider, bench: KeyProviderBench, dek: Dek, wrapped: WrappedDek, context: DekContext
) -> None:
    texts = [repr(provider), str(provider), repr(vars(provider)), repr(wrapped), str(wrapped)]
    texts += _error_texts(provider, bench, dek, wrapped, context)
    for secret in (dek.material, *bench.secrets):
        forms = {repr(secret)[2:-1], secret.hex(), base64.b64encode(secret).decode()}
        assert [text for text in texts for form in forms if form in text] == []
    with contextlib.suppress(TypeError, pickle.PicklingError):  # better still
        pickled = pickle.dumps(provider)
        assert [secret for secret in bench.secrets if secret in pickled] == []


def _error_texts(
    provider: KeyProvider, bench: KeyProviderBench, dek: Dek, wrapped: WrappedDek, context: DekContext
) -> Iterator[str]:
    unknown = dataclasses.replace(wrapped.key, version="no-such-version")
    elsewhere = dataclasses.replace(context, slot="elsewhere")
    calls: list[Callable[[], object]] = [
        lambda: provider.unwrap(wrapped, context=elsewhere),
        lambda: provider.unwrap(dataclasses.replace(wrapped, ciphertext=bytes(72)), context=context),
        lambda: provider.unwrap(dataclasses.replace(wrapped, algorithm="none"), context=context),
        lambda: provider.unwrap(dataclasses.replace(wrapped, key=unknown), context=context),
        lambda: provider.wrap(dek, unknown, context=context),
        lambda: provider.current_key("no-such-key"),
    ]
    if bench.disable is not None:
        bench.disable(wrapped.key)
        calls.append(lambda: provider.wrap(dek, wrapped.key, context=context))
    for call in calls:
        with pytest.raises(Exception) as caught:  # noqa: PT011 -- of whatever kind, it may show nothing
            call()
        error: BaseException | None = caught.value
        yield "".join(traceback.format_exception(caught.value))
        while error is not None:
            yield repr((error, error.args, vars(error)))
            error = error.__cause__ or error.__context__


def test_ten_threads_wrap_and_unwrap_at_once(provider: KeyProvider, bench: KeyProviderBench) -> None:
    key = provider.current_key(bench.key)
    start = threading.Barrier(10)

    def work(thread: int) -> bool:
        start.wait()
        for turn in range(20):
            context, dek = DekContext(uuid.uuid4(), f"slot-{thread}-{turn}"), Dek.generate()
            if provider.unwrap(provider.wrap(dek, key, context=context), context=context) != dek:
                return False
        return True

    with ThreadPoolExecutor(10) as pool:
        assert all(pool.map(work, range(10)))


def test_a_provider_closed_and_reopened_still_unwraps(
    open_provider: OpenProvider, bench: KeyProviderBench, dek: Dek, context: DekContext
) -> None:
    first = open_provider()
    wrapped = first.wrap(dek, first.current_key(bench.key), context=context)
    first.close()
    again = open_provider()
    assert again.unwrap(wrapped, context=context) == dek
    assert again.current_key(bench.key) == wrapped.key


def test_two_instances_unwrap_each_others_deks(
    open_provider: OpenProvider, bench: KeyProviderBench, dek: Dek, context: DekContext
) -> None:
    one, other = open_provider(), open_provider()
    key: KeyId = one.current_key(bench.key)
    assert other.current_key(bench.key) == key
    assert other.unwrap(one.wrap(dek, key, context=context), context=context) == dek
    bench.rotate()
    assert one.current_key(bench.key) == other.current_key(bench.key) != key
    one.close()
    assert other.unwrap(other.wrap(dek, key, context=context), context=context) == dek


@pytest.mark.slow
def test_two_processes_unwrap_each_others_deks(
    provider: KeyProvider,
    bench: KeyProviderBench,
    dek: Dek,
    wrapped: WrappedDek,
    context: DekContext,
    in_other_process: InOtherProcess,
) -> None:
    bench.rotate()
    theirs = in_other_process(wrapped, context)
    assert theirs.key == provider.current_key(bench.key)
    assert provider.unwrap(theirs, context=context) == dek


def test_an_unknown_option_is_refused(open_provider: OpenProvider) -> None:
    with pytest.raises(ConfigError):
        open_provider(**{"no-such-option": 1})


def test_provisioning_again_changes_nothing(
    provider: KeyProvider, dek: Dek, wrapped: WrappedDek, context: DekContext
) -> None:
    assert not provider.provision()
    assert provider.current_key(wrapped.key.name) == wrapped.key
    assert provider.unwrap(wrapped, context=context) == dek

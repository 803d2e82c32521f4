"""The customer-managed provider, and what a server in a key vault's place may answer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
import traceback
from collections.abc import Iterator
from types import ModuleType, TracebackType
from uuid import UUID

import pytest

from support.customer_managed_uses import (
    CIPHERTEXT,
    CONTEXT,
    DEK,
    JSON,
    OTHER_VERSION,
    VERSION,
    bundle,
    encoded,
    key_at,
    result,
    uses,
    wrapped_at,
)
from support.strange_vaults import TOKEN, Answer, StrangeVault, document, refusal
from virt_sse.errors import (
    KeyDeniedError,
    KeyDisabledError,
    KeyNotFoundError,
    KeyOperationUnsupportedError,
    KeyProviderError,
    KeyProviderUnavailableError,
    UnwrapError,
    VirtSseError,
)
from virt_sse.model.events import correlated
from virt_sse.model.keys import KeyState, WrappedDek
from virt_sse.vault_client.credential import VaultCredential
from virt_sse_plugins.key_providers.customer_managed import CustomerManagedKeyProvider

# --- What the vault says


def test_an_answer_that_trickles_is_no_answer(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    """Each byte comes long before the time limit; the whole answer would take longer by far."""
    strange_vault.answers = [bundle(strange_vault.url)]
    customer_managed.current_key(f"{strange_vault.url}/keys/web")
    strange_vault.pause = 0.03
    began = time.monotonic()
    with pytest.raises(KeyProviderUnavailableError, match="does not answer"):
        customer_managed.current_key(f"{strange_vault.url}/keys/web")
    assert time.monotonic() - began < 5


def test_a_token_that_trickles_is_no_token(strange_vault: StrangeVault) -> None:
    strange_vault.pause = 0.03
    with contextlib.closing(VaultCredential(strange_vault.credential_file(), timeout=0.5)) as credential:
        began = time.monotonic()
        with pytest.raises(KeyProviderUnavailableError, match="does not answer: timed out"):
            credential.token()
    assert time.monotonic() - began < 5


def test_requests_are_those_of_the_azure_api(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    strange_vault.answers = [
        bundle(strange_vault.url),
        result(strange_vault.url, encoded(CIPHERTEXT)),
        result(strange_vault.url, encoded(CONTEXT.bind(DEK))),
    ]
    key = customer_managed.current_key(f"{strange_vault.url}/keys/web")
    assert key == key_at(strange_vault.url)
    with correlated() as correlation:
        wrapped = customer_managed.wrap(DEK, key, context=CONTEXT)
    assert wrapped == WrappedDek(CIPHERTEXT, "RSA-OAEP-256", key)
    older = dataclasses.replace(wrapped, algorithm="RSA-OAEP")
    assert customer_managed.unwrap(older, context=CONTEXT) == DEK

    read, wrap, unwrap = strange_vault.seen
    assert (read.method, read.path.split("?")[0]) == ("GET", "/keys/web/")
    assert (wrap.method, wrap.path.split("?")[0]) == ("POST", f"/keys/web/{VERSION}/wrapkey")
    assert (unwrap.method, unwrap.path.split("?")[0]) == ("POST", f"/keys/web/{VERSION}/unwrapkey")
    assert json.loads(wrap.body) == {"alg": "RSA-OAEP-256", "value": encoded(CONTEXT.bind(DEK))}
    assert json.loads(unwrap.body) == {"alg": "RSA-OAEP", "value": encoded(CIPHERTEXT)}
    assert wrap.headers["x-ms-client-request-id"] == str(correlation)
    assert UUID(unwrap.headers["x-ms-client-request-id"]) != correlation
    assert wrap.headers["x-virt-sse-disk"] == unwrap.headers["x-virt-sse-disk"] == str(CONTEXT.disk_id)
    assert strange_vault.tokens == 1


@pytest.mark.parametrize(
    ("answer", "error", "state"),
    [
        (refusal(403, "Forbidden", "KeyDisabled"), KeyDisabledError, KeyState.DISABLED),
        (refusal(403, "Forbidden", "ForbiddenByPolicy"), KeyDeniedError, KeyState.DENIED),
        (refusal(403, "Forbidden", "ForbiddenByRbac"), KeyDeniedError, KeyState.DENIED),
        (refusal(403, "Forbidden"), KeyDeniedError, KeyState.DENIED),
        (refusal(401, "Unauthorized"), KeyDeniedError, KeyState.DENIED),
        (refusal(404, "KeyNotFound"), KeyNotFoundError, KeyState.DELETED),
        (refusal(409, "Conflict", "ObjectIsBeingDeleted"), KeyProviderError, KeyState.UNREACHABLE),
        (refusal(429, "Throttled"), KeyProviderUnavailableError, KeyState.UNREACHABLE),
        (refusal(500, "InternalServerError"), KeyProviderUnavailableError, KeyState.UNREACHABLE),
        (refusal(503, "ServiceUnavailable"), KeyProviderUnavailableError, KeyState.UNREACHABLE),
    ],
)
def test_a_refusal_is_raised_by_its_meaning(
    strange_vault: StrangeVault,
    customer_managed: CustomerManagedKeyProvider,
    answer: Answer,
    error: type[KeyProviderError],
    state: KeyState,
) -> None:
    strange_vault.answers = [answer]
    said = json.loads(answer.body)["error"]
    reason = said.get("innererror", said)["code"]
    for use in uses(customer_managed, strange_vault.url):
        with pytest.raises(error, match=rf"\({answer.status} {reason}\)") as caught:
            use()
        assert type(caught.value) is error
    assert customer_managed.key_state(key_at(strange_vault.url)) is state


def test_a_disabled_key_is_told_from_a_key_that_may_not_unwrap(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    strange_vault.answers = [bundle(strange_vault.url, enabled=False)]
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.DISABLED
    key = {"kid": key_at(strange_vault.url).name + f"/{VERSION}", "key_ops": ["wrapKey"]}
    strange_vault.answers = [document(key=key, attributes={"enabled": True})]
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.DENIED


@pytest.mark.parametrize(
    ("kind", "bits", "reason"),
    [
        ("RSA", 2048, None),
        ("RSA-HSM", 4096, None),
        ("RSA", 1024, "has 1024 bits"),
        ("RSA", 8192, "has 8192 bits"),
        ("EC", None, "has type 'EC'"),
        ("oct", None, "has type 'oct'"),
        (None, None, "has type 'None'"),
    ],
)
def test_a_key_has_to_be_an_rsa_key_of_a_supported_size(
    strange_vault: StrangeVault,
    customer_managed: CustomerManagedKeyProvider,
    kind: str | None,
    bits: int | None,
    reason: str | None,
) -> None:
    key: dict[str, object] = {"kid": key_at(strange_vault.url).name + f"/{VERSION}", "kty": kind}
    if bits:
        key["n"] = encoded(bytes([0x80, *bytes(bits // 8 - 1)]))
    strange_vault.answers = [document(key=key, attributes={"enabled": True})]
    name = f"{strange_vault.url}/keys/web"
    if reason is None:
        assert customer_managed.current_key(name) == key_at(strange_vault.url)
        return
    with pytest.raises(KeyOperationUnsupportedError, match=f"{reason}: a customer-managed key is an RSA key"):
        customer_managed.current_key(name)


def test_a_dek_that_the_vault_cannot_unwrap_is_an_unwrap_error(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    strange_vault.answers = [refusal(400, "BadParameter")]
    with pytest.raises(
        UnwrapError, match=r"refused the unwrap \(400 BadParameter\).* is damaged, or was not"
    ):
        customer_managed.unwrap(wrapped_at(strange_vault.url), context=CONTEXT)
    with pytest.raises(KeyProviderError, match=r"refused the wrap \(400 BadParameter\)") as caught:
        customer_managed.wrap(DEK, key_at(strange_vault.url), context=CONTEXT)
    assert not isinstance(caught.value, UnwrapError)
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
    seen = len(strange_vault.seen)
    too_long = dataclasses.replace(wrapped_at(strange_vault.url), ciphertext=bytes(100_000))
    with pytest.raises(UnwrapError, match="100000 bytes does not fit an RSA key"):
        customer_managed.unwrap(too_long, context=CONTEXT)
    assert len(strange_vault.seen) == seen


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200),
        Answer(204),
        Answer(200, b"<html>It works!</html>", {"Content-Type": "text/html"}),
        Answer(200, b"<html>It works!</html>", JSON),
        Answer(200, b"<a/>", {"Content-Type": "application/xml"}),
        Answer(200, b"\xff\xfe\x00", JSON),
        Answer(200, b"[]", JSON),
        Answer(200, b"null", JSON),
        Answer(200, b"{}", JSON),
        Answer(200, b"[" * 100_000, JSON),
        Answer(200, b"{}", JSON | {"Content-Encoding": "gzip"}),
        Answer(200, b"{}", {"Content-Type": "application/json; charset=no-such"}),
        Answer(400, b"<html>", {"Content-Type": "text/html"}),
        Answer(401, b"", {}),
        Answer(403, b"<html>Blocked</html>", {"Content-Type": "text/html"}),
        Answer(404, b"<html>Not found</html>", {"Content-Type": "text/html"}),
        Answer(404, b'{"error": "not found"}', JSON),
        Answer(404, b'{"error": {"code": 5}}', JSON),
        Answer(418, b"{}", JSON),
        Answer(600, b"{}", JSON),
        refusal(404, "NotFound"),
        refusal(404, "no such key: KeyNotFound"),
        refusal(200, "Forbidden", "KeyDisabled"),
        refusal(302, "Forbidden", "KeyDisabled"),
    ],
)
def test_an_invalid_answer_is_no_verdict(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider, answer: Answer
) -> None:
    strange_vault.answers = [answer]
    for use in uses(customer_managed, strange_vault.url):
        with pytest.raises(KeyProviderUnavailableError):
            use()
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE


@pytest.mark.parametrize(
    "value",
    [
        None,
        1,
        "",
        "?",
        "a",
        "\u0661\u0661",
        "AA AA",
        *(encoded(CIPHERTEXT) + more for more in ("A", "=A", "AAA")),
    ],
)
def test_an_invalid_value_is_no_result(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider, value: object
) -> None:
    strange_vault.answers = [result(strange_vault.url, value)]
    with pytest.raises(KeyProviderUnavailableError, match="answer is invalid"):
        customer_managed.wrap(DEK, key_at(strange_vault.url), context=CONTEXT)
    with pytest.raises(KeyProviderError):
        customer_managed.unwrap(wrapped_at(strange_vault.url), context=CONTEXT)


def test_an_answer_about_another_key_is_refused(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    value = encoded(CONTEXT.bind(DEK))
    for version, name in ((OTHER_VERSION, "web"), (VERSION, "other"), ("", "web")):
        strange_vault.answers = [result(strange_vault.url, value, version, name)]
        with pytest.raises(KeyProviderUnavailableError, match="answer is invalid"):
            customer_managed.wrap(DEK, key_at(strange_vault.url), context=CONTEXT)
        with pytest.raises(KeyProviderUnavailableError, match="answer is invalid"):
            customer_managed.unwrap(wrapped_at(strange_vault.url), context=CONTEXT)
        strange_vault.answers = [bundle(strange_vault.url, version, name)]
        assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
    strange_vault.answers = [bundle("https://also-called.example")]
    assert customer_managed.current_key(f"{strange_vault.url}/keys/web").version == VERSION


@pytest.mark.parametrize("enabled", [None, "false", 0])
def test_an_unclear_state_is_unreachable(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider, enabled: object
) -> None:
    strange_vault.answers = [bundle(strange_vault.url, enabled=enabled)]
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE


# --- Trying again


@pytest.mark.parametrize("failure", [None, refusal(429, "Throttled", None, **{"Retry-After": "0"})])
def test_a_lost_connection_and_a_short_delay_are_tried_again_once(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider, failure: Answer | None
) -> None:
    strange_vault.answers = [failure, result(strange_vault.url, encoded(CIPHERTEXT))]
    assert customer_managed.wrap(DEK, key_at(strange_vault.url), context=CONTEXT).ciphertext == CIPHERTEXT
    assert len(strange_vault.seen) == 2
    strange_vault.answers = [failure]
    with pytest.raises(KeyProviderUnavailableError):
        customer_managed.wrap(DEK, key_at(strange_vault.url), context=CONTEXT)
    assert len(strange_vault.seen) == 4
    with pytest.raises(KeyProviderUnavailableError):
        customer_managed.rotate(f"{strange_vault.url}/keys/web")
    assert len(strange_vault.seen) == 5  # twice would be two versions


@pytest.mark.parametrize("after", ["3600", "Wed, 21 Oct 2099 07:28:00 GMT", "-1", "nan", "x"])
def test_a_long_delay_is_not_waited_for(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider, after: str
) -> None:
    strange_vault.answers = [refusal(503, "ServiceUnavailable", None, **{"Retry-After": after})]
    began = time.monotonic()
    with pytest.raises(KeyProviderUnavailableError, match="cannot answer now"):
        customer_managed.wrap(DEK, key_at(strange_vault.url), context=CONTEXT)
    assert time.monotonic() - began < 1
    assert len(strange_vault.seen) == 1


def test_a_refused_token_is_renewed_once(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    strange_vault.answers = [bundle(strange_vault.url)]
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.ENABLED
    unauthorized = refusal(
        401, "Unauthorized", **{"WWW-Authenticate": strange_vault.challenge(strange_vault.url)}
    )
    strange_vault.answers = [unauthorized, unauthorized, bundle(strange_vault.url)]
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.ENABLED
    assert strange_vault.tokens == 2
    strange_vault.answers = [unauthorized]
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.DENIED
    assert strange_vault.tokens == 3


def test_an_invalid_token_endpoint_is_no_verdict(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    for answer in (
        Answer(500),
        Answer(200, b"<html>"),
        document(access_token=1),
        Answer(429),
        Answer(404, b"<html>a proxy's</html>"),
        Answer(401, b"<html>likewise</html>"),
        Answer(400, b'{"error": "invalid_grant"}', JSON),  # this host's clock is wrong
    ):
        strange_vault.token_answer = answer
        assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.UNREACHABLE
        with pytest.raises(KeyProviderUnavailableError):
            customer_managed.unwrap(wrapped_at(strange_vault.url), context=CONTEXT)
    assert strange_vault.seen == []


def test_a_refused_identity_is_a_verdict(
    strange_vault: StrangeVault, customer_managed: CustomerManagedKeyProvider
) -> None:
    strange_vault.token_answer = Answer(401, b'{"error": "invalid_client"}', JSON)
    assert customer_managed.key_state(key_at(strange_vault.url)) is KeyState.DENIED
    with pytest.raises(KeyDeniedError):
        customer_managed.unwrap(wrapped_at(strange_vault.url), context=CONTEXT)


# --- Secrets


@pytest.mark.parametrize(
    "answer",
    [
        None,
        Answer(200, b'{"value": "' + encoded(CONTEXT.bind(DEK)).encode(), JSON),
        Answer(500, encoded(CONTEXT.bind(DEK)).encode(), {"Content-Type": "text/plain"}),
        refusal(403, encoded(CONTEXT.bind(DEK)), encoded(DEK.material)),
        document(kid=encoded(DEK.material), value=encoded(CONTEXT.bind(DEK))),
    ],
)
def test_no_error_holds_a_dek_or_a_token(
    strange_vault: StrangeVault,
    customer_managed: CustomerManagedKeyProvider,
    answer: Answer | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    strange_vault.answers = [answer]
    for use in (
        lambda: customer_managed.wrap(DEK, key_at(strange_vault.url), context=CONTEXT),
        lambda: customer_managed.unwrap(wrapped_at(strange_vault.url), context=CONTEXT),
    ):
        with pytest.raises(VirtSseError) as caught:
            use()
        texts = ["".join(traceback.format_exception(caught.value)), *_texts_in(caught.value)]
        for secret in (encoded(CONTEXT.bind(DEK))[:43], encoded(DEK.material)[:40], TOKEN):
            assert [text for text in texts if secret in text] == []
            assert secret not in caplog.text
    assert encoded(CONTEXT.bind(DEK)) in strange_vault.seen[0].body.decode()


def _texts_in(error: BaseException) -> Iterator[str]:
    """Every text that hangs on *error*, but for the frames of its traceback."""
    seen: set[int] = set()
    waiting: list[object] = [error]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | TracebackType):
            continue
        seen.add(id(thing))
        if isinstance(thing, str | bytes | bytearray):
            yield thing if isinstance(thing, str) else bytes(thing).decode("latin-1")
        elif isinstance(thing, dict):
            waiting += [*thing.keys(), *thing.values()]
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        else:
            waiting += vars(thing).values() if hasattr(thing, "__dict__") else []
        if isinstance(thing, BaseException):
            waiting += [thing.args, thing.__cause__, thing.__context__]

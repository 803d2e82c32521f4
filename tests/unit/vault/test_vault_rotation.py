from __future__ import annotations

import pytest

from support.vault_doubles import DAY, Clock, Records
from virt_sse.errors import InvalidValueError
from virt_sse.vault.http.limits import Limits
from virt_sse.vault.keys.durations import seconds_of
from virt_sse.vault.keys.records import Attributes, NewKey
from virt_sse.vault.properties import LAST_MOMENT
from virt_sse.vault.rate_limit import RateLimit
from virt_sse.vault.refusals import Refusal
from virt_sse.vault.trail import Trail
from virt_sse.vault.upkeep import upkeep
from virt_sse.vault.vault import Vault


def policy(trigger: dict[str, str], expiry: str | None = None, action: str = "Rotate") -> dict[str, object]:
    return {
        "lifetimeActions": [{"trigger": trigger, "action": {"type": action}}],
        "attributes": {"expiryTime": expiry} if expiry else {},
    }


AFTER_30_DAYS = policy({"timeAfterCreate": "P30D"})


def test_a_key_is_rotated_when_its_newest_version_is_old_enough(vault: Vault, clock: Clock) -> None:
    first = vault.keys.create("kek", "RSA", 3072, NewKey(operations=("unwrapKey",), tags={"a": "b"}))
    vault.rotation.set_policy("kek", AFTER_30_DAYS)
    clock.now += 30 * DAY - 1
    assert vault.rotation.due() == []
    clock.now += 1
    assert vault.rotation.due() == ["kek"]
    second = vault.rotation.rotate("kek")
    assert vault.rotation.due() == []
    assert (second.public.bits, second.operations, second.tags) == (3072, first.operations, first.tags)
    assert second.version != first.version


def test_a_key_is_rotated_before_it_expires_and_lives_as_long_again(vault: Vault, clock: Clock) -> None:
    expires = int(clock.now) + 90 * DAY
    vault.keys.create("kek", "RSA", 2048, NewKey(attributes=Attributes(expires=expires)))
    vault.rotation.set_policy("kek", policy({"timeBeforeExpiry": "P10D"}, "P60D"))
    clock.now = expires - 10 * DAY - 1
    assert vault.rotation.due() == []
    clock.now += 1
    assert vault.rotation.due() == ["kek"]
    assert vault.rotation.rotate("kek").attributes.expires == int(clock.now) + 60 * DAY
    assert vault.rotation.due() == []


def test_a_disabled_key_is_not_given_a_usable_version(vault: Vault, clock: Clock) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey(attributes=Attributes(enabled=False)))
    vault.rotation.set_policy("kek", AFTER_30_DAYS)
    clock.now += 365 * DAY
    assert vault.rotation.due() == []


def test_a_disabled_key_is_not_rotated_on_request(vault: Vault) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey(attributes=Attributes(enabled=False)))
    with pytest.raises(Refusal, match="not allowed on a disabled key"):
        vault.rotation.rotate("kek")
    assert len(vault.keys.versions("kek")) == 1


@pytest.mark.parametrize(
    "document",
    [
        {"attributes": {"expiryTime": "P9999Y"}},
        {
            "lifetimeActions": [{"trigger": {"timeAfterCreate": "P101Y"}, "action": {"type": "Rotate"}}],
        },
    ],
)
def test_a_time_that_clients_cannot_show_is_refused(vault: Vault, document: dict[str, object]) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    with pytest.raises(Refusal, match="at most 100 years"):
        vault.rotation.set_policy("kek", document)


def test_an_absurd_policy_of_an_older_version_makes_no_absurd_expiry(vault: Vault) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    vault.keys._store.set_policy("kek", lambda _: '{"attributes": {"expiryTime": "P9999Y"}}')
    assert vault.rotation.rotate("kek").attributes.expires == LAST_MOMENT


def test_a_deleted_key_is_not_rotated(vault: Vault, clock: Clock) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    vault.rotation.set_policy("kek", AFTER_30_DAYS)
    vault.keys.delete("kek")
    clock.now += 365 * DAY
    assert vault.rotation.due() == []


def test_automatic_rotations_are_recorded(vault: Vault, clock: Clock, records: Records) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    vault.rotation.set_policy("kek", AFTER_30_DAYS)
    vault.keys.create("old", "RSA", 2048, NewKey())
    vault.keys.delete("old")
    clock.now += 90 * DAY
    upkeep(vault, Trail(records))
    assert len(vault.keys.versions("kek")) == 2
    assert vault.keys.count() == (1, 0)
    told = [(record.actor, record.action, record.key[-4:], record.result.value) for record in records.all]
    assert told == [
        *(("vault", "rotate", "/kek", "requested"), ("vault", "rotate", "/kek", "allowed")),
        *(("vault", "purge", "/old", "requested"), ("vault", "purge", "/old", "allowed")),
    ]
    upkeep(vault, Trail(records))
    assert len(records.all) == 4


def test_a_policy_is_given_back_as_it_was_given(vault: Vault, clock: Clock) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    assert vault.rotation.policy("kek")["lifetimeActions"] == [
        {"trigger": {"timeBeforeExpiry": "P30D"}, "action": {"type": "Notify"}}
    ]
    given = policy({"timeAfterCreate": "P1M"}, "P1Y")
    made = vault.rotation.set_policy("kek", given)
    assert made == vault.rotation.policy("kek")
    assert made["lifetimeActions"] == given["lifetimeActions"]
    clock.now += 5
    again = vault.rotation.set_policy("kek", given)
    assert again["attributes"] == {
        "created": int(clock.now) - 5,
        "updated": int(clock.now),
        "expiryTime": "P1Y",
    }


@pytest.mark.parametrize(
    "wrong",
    [
        policy({"timeAfterCreate": "P6D"}),
        policy({"timeAfterCreate": "P30D"}, "P27D"),
        policy({"timeAfterCreate": "P60D"}, "P30D"),
        policy({"timeBeforeExpiry": "P10D"}),
        policy({"timeBeforeExpiry": "P60D"}, "P60D"),
        policy({"timeAfterCreate": "P30D", "timeBeforeExpiry": "P30D"}, "P90D"),
        policy({}),
        policy({"timeAfterCreate": "thirty days"}),
        policy({"timeAfterCreate": "P30D"}, action="Explode"),
        {"lifetimeActions": [*AFTER_30_DAYS["lifetimeActions"], *AFTER_30_DAYS["lifetimeActions"]]},  # type: ignore[misc]
        {"lifetimeActions": "often"},
        {"lifetimeActions": ["often"]},
        {"lifetimeActions": [{"action": "Rotate"}]},
        {"attributes": []},
    ],
)
def test_an_invalid_policy_is_refused(vault: Vault, wrong: dict[str, object]) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    with pytest.raises(Refusal) as refused:
        vault.rotation.set_policy("kek", wrong)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("P7D", 7 * DAY),
        ("P1Y", 365 * DAY),
        ("P2M", 60 * DAY),
        ("P1W", 7 * DAY),
        ("PT90M", 5400),
        ("P1DT1S", DAY + 1),
    ],
)
def test_a_duration_is_read_in_seconds(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "P", "PT", "7D", "P-7D", "P7", "P7D ", "p7d", "P1.5D", "P٣D", "P99999999D", "P7DT"]
)
def test_an_invalid_duration_is_refused(text: str) -> None:
    with pytest.raises(Refusal, match="ISO 8601"):
        seconds_of(text)


def test_a_bucket_gives_a_burst_then_its_rate() -> None:
    clock = Clock()
    bucket = RateLimit(10, 5, clock)
    assert [bucket.take() for _ in range(5)] == [0.0] * 5
    assert bucket.take() == pytest.approx(0.1)
    clock.now += 0.125
    assert bucket.take() == 0.0
    assert bucket.take() > 0
    clock.now += 1000
    assert [bucket.take() == 0.0 for _ in range(6)] == [True] * 5 + [False]


@pytest.mark.parametrize(("concurrency", "rate"), [(0, 0), (1, -1), (1, float("inf")), (1, float("nan"))])
def test_invalid_limits_are_refused(concurrency: int, rate: float) -> None:
    with pytest.raises(InvalidValueError):
        Limits(concurrency, rate)


def test_a_key_disabled_after_the_check_is_not_rotated(vault: Vault, clock: Clock) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    vault.rotation.set_policy("kek", AFTER_30_DAYS)
    clock.now += 30 * DAY
    assert vault.rotation.due() == ["kek"]
    vault.keys.update("kek", "", attributes={"enabled": False}, operations=None, tags=None)
    with pytest.raises(Refusal, match="no longer due"):
        vault.rotation.rotate_due("kek")
    assert len(vault.keys.versions("kek")) == 1


def test_a_key_recovered_and_deleted_again_after_the_check_is_not_purged(vault: Vault, clock: Clock) -> None:
    vault.keys.create("kek", "RSA", 2048, NewKey())
    vault.keys.delete("kek")
    clock.now += 90 * DAY
    assert vault.keys.due_for_purge() == ["kek"]
    vault.keys.recover("kek")
    vault.keys.delete("kek")
    with pytest.raises(Refusal, match="has not ended"):
        vault.keys.purge_due("kek")
    assert vault.keys.get_deleted("kek")

from __future__ import annotations

from typing import cast

import pytest

from virt_sse.vault.keys.opened_keys import OpenedKey, OpenedKeys


def entry() -> OpenedKey:
    return cast("OpenedKey", object())


def test_a_version_is_opened_once() -> None:
    keys, first = OpenedKeys(2), entry()
    assert keys.get("a", "1", lambda: first) is first
    assert keys.get("a", "1", entry) is first


def test_the_least_recently_used_key_is_dropped_first() -> None:
    keys, first, second = OpenedKeys(2), entry(), entry()
    keys.get("a", "1", lambda: first)
    keys.get("b", "1", lambda: second)
    keys.get("a", "1", entry)
    keys.get("c", "1", entry)
    assert len(keys) == 2
    assert keys.get("a", "1", entry) is first
    assert keys.get("b", "1", entry) is not second


def test_a_changed_key_is_opened_anew_and_others_are_not() -> None:
    keys, first, other = OpenedKeys(9), entry(), entry()
    for version in ("1", ""):
        keys.get("a", version, lambda: first)
    keys.get("b", "1", lambda: other)
    keys.forget("a")
    assert keys.get("a", "1", entry) is not first
    assert keys.get("a", "", entry) is not first
    assert keys.get("b", "1", entry) is other


def test_a_key_read_before_a_change_is_not_kept_after_the_change() -> None:
    keys, stale = OpenedKeys(9), entry()

    def read_while_it_changes() -> OpenedKey:
        keys.forget("a")
        return stale

    assert keys.get("a", "1", read_while_it_changes) is stale
    assert keys.get("a", "1", entry) is not stale


def test_a_key_that_fails_to_open_is_opened_again() -> None:
    keys, good = OpenedKeys(9), entry()

    def fails() -> OpenedKey:
        raise LookupError

    with pytest.raises(LookupError):
        keys.get("a", "1", fails)
    assert keys.get("a", "1", lambda: good) is good

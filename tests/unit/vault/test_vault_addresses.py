"""Several addresses of one vault: which is asked, for how long, and whose answer counts."""

from __future__ import annotations

import time

import pytest

from virt_sse.errors import KeyDisabledError, KeyProviderUnavailableError
from virt_sse.vault_client.addresses import VaultAddresses
from virt_sse.vault_client.deadlines import remaining


class Instances:
    """:ivar down: the addresses that do not answer.
    :ivar asked: the addresses asked since the last look, in order.
    """

    def __init__(self, *urls: str, pause: float = 60) -> None:
        self.down: set[str] = set()
        self.asked: list[str] = []
        self.shares: list[float] = []
        self.addresses = VaultAddresses(urls, pause=pause)

    def ask(self, url: str) -> str:
        self.asked.append(url)
        self.shares.append(remaining() or 0.0)
        if url in self.down:
            raise KeyProviderUnavailableError(f"{url} is down")
        return url

    def answer(self, *, repeatable: bool = True) -> tuple[str, list[str]]:
        self.asked.clear()
        return self.addresses.first_answer(self.ask, timeout=6, repeatable=repeatable), list(self.asked)


def test_the_first_address_that_answers_is_used_and_a_silent_one_is_avoided_for_a_time() -> None:
    instances = Instances("a", "b", pause=0.05)
    assert instances.answer() == ("a", ["a"])
    instances.down = {"a"}
    assert instances.answer() == ("b", ["a", "b"])
    assert instances.answer() == ("b", ["b"])
    instances.down = set()
    time.sleep(0.06)
    assert instances.answer() == ("a", ["a"])


def test_avoided_addresses_are_asked_before_giving_up() -> None:
    instances = Instances("a", "b")
    instances.down = {"a", "b"}
    with pytest.raises(KeyProviderUnavailableError, match=r"no address .*: a is down; b is down"):
        instances.answer()
    instances.down = {"b"}
    assert instances.answer()[0] == "a"


def test_the_time_is_shared_among_the_addresses_left() -> None:
    instances = Instances("a", "b", "c")
    instances.down = {"a", "b"}
    assert instances.answer()[0] == "c"
    assert [round(share) for share in instances.shares] == [2, 3, 6]


def test_a_refusal_is_an_answer_that_no_other_address_overrules() -> None:
    addresses = VaultAddresses(("a", "b"))
    asked = []

    def refuse(url: str) -> str:
        asked.append(url)
        raise KeyDisabledError("disabled")

    for _ in range(2):
        with pytest.raises(KeyDisabledError):
            addresses.first_answer(refuse, timeout=1)
    assert asked == ["a", "a"]


def test_a_request_that_must_not_be_repeated_is_sent_once() -> None:
    instances = Instances("a", "b")
    instances.down = {"a"}
    with pytest.raises(KeyProviderUnavailableError, match=r"^a is down$"):
        instances.answer(repeatable=False)
    assert instances.asked == ["a"]
    assert instances.answer(repeatable=False) == ("b", ["b"])

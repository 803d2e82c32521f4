"""The iothread of a disk."""

from __future__ import annotations

import os

import pytest

from virt_sse.errors import InvalidValueError
from virt_sse.libvirt.iothreads import IothreadChoice, choose, iothreads, parse_choice
from virt_sse.libvirt.xml import parse_xml

NEW, AUTO = IothreadChoice.NEW, IothreadChoice.AUTO


def found(content: str, *served: int) -> dict[int, int]:
    disks = "".join(f"<disk><driver iothread='{number}'/></disk>" for number in served)
    xml = f"<domain>{content}<devices><disk/>{disks}</devices></domain>"
    return iothreads(parse_xml(xml, kind="domain XML"))


def test_iothreads_are_counted_as_libvirt_numbers_them() -> None:
    assert found("") == {}
    assert found("<iothreads>2</iothreads>", 2, 2) == {1: 0, 2: 2}
    ids = "<iothreadids><iothread id='7'/><iothread id='2'/></iothreadids>"
    assert found(ids, 7) == {2: 0, 7: 1}
    assert found(f"<iothreads>4</iothreads>{ids}") == {1: 0, 2: 0, 3: 0, 7: 0}
    with pytest.raises(InvalidValueError):
        found("<iothreads>many</iothreads>")


def test_a_number_has_to_be_present_in_each_definition() -> None:
    assert choose(2, [{1: 0, 2: 3}]) == (2, False)
    assert choose(2, [{1: 0, 2: 3}, {2: 0}]) == (2, False)
    with pytest.raises(InvalidValueError, match="no iothread 1") as caught:
        choose(1, [{1: 0, 2: 3}, {2: 0}])
    assert "present: 2" in str(caught.value.hint)


def test_a_new_iothread_has_the_lowest_number_free_in_each_definition() -> None:
    assert choose(NEW, [{}]) == (1, True)
    assert choose(NEW, [{1: 0, 3: 0}, {1: 0, 2: 1}]) == (4, True)


def test_an_automatic_choice_prefers_idle_threads_then_new_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert choose(AUTO, [{}]) == (1, True)
    assert choose(AUTO, [{1: 1, 2: 0}]) == (2, False)
    assert choose(AUTO, [{1: 1, 2: 2}]) == (3, True)
    assert choose(AUTO, [{1: 2, 2: 1, 3: 2}]) == (2, False)
    assert choose(AUTO, [{1: 0}, {1: 1}]) == (2, True)


@pytest.mark.parametrize("text", ["0", "-1", "", "one", "1.5", "²", "4294967296", "9" * 40])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match="invalid iothread"):
        parse_choice(text)


def test_choices_are_read() -> None:
    assert [parse_choice(text) for text in ("1", "new", "auto")] == [1, NEW, AUTO]

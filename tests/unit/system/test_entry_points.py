"""Entry points are those that importlib.metadata finds."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from virt_sse.plugins import ENTRY_POINT_GROUP
from virt_sse.system.entry_points import installed_entry_points


@pytest.mark.parametrize("group", [ENTRY_POINT_GROUP, "console_scripts", "pytest11", "no-such-group"])
def test_entry_points_are_those_of_importlib(group: str) -> None:
    found = [(each.name, each.value) for each in installed_entry_points(group)]
    expected = [(each.name, each.value) for each in importlib.metadata.entry_points(group=group)]
    assert sorted(found) == sorted(expected)


def test_the_first_version_of_a_distribution_on_the_path_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, name, value in (
        ("a", "Some_Plugin-2.0", "json:loads"),
        ("b", "some.plugin-1.0", "json:dumps"),
    ):
        metadata = tmp_path / folder / f"{name}.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "entry_points.txt").write_text(
            f"# text\n[other]\nx = os\n\n[ some ]\nplugin = {value} [x]\n"
        )
    monkeypatch.setattr(sys, "path", ["/nonexistent", str(tmp_path / "a"), str(tmp_path / "b")])
    (plugin,) = installed_entry_points("some")
    assert plugin.name == "plugin"
    assert plugin.load() is json.loads


def test_a_missing_attribute_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "plugin-1.dist-info"
    metadata.mkdir()
    (metadata / "entry_points.txt").write_text("[some]\nplugin = json:nothing\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (plugin,) = installed_entry_points("some")
    with pytest.raises(AttributeError, match="nothing"):
        plugin.load()

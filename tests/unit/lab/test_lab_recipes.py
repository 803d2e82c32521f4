from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from virt_sse.errors import LabError, LabUnavailableError
from virt_sse.lab import recipes


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The ``build`` of a recipe "thing", with a cache of its own."""
    monkeypatch.setenv("VIRT_SSE_VM_IMAGES", str(tmp_path / "vm-images"))
    monkeypatch.setenv("VIRT_SSE_LAB_CACHE", str(tmp_path / "cache"))
    build = tmp_path / "vm-images/thing/build"
    build.parent.mkdir(parents=True)
    return build


def write(build: Path, script: str) -> None:
    build.write_text(f"#!/bin/sh\nset -e\n{script}\n")
    build.chmod(0o755)


def test_a_recipe_is_built_once_and_again_when_it_changes(recipe: Path, tmp_path: Path) -> None:
    write(recipe, f'echo one >"$1/image"; echo built >>{tmp_path}/log')
    assert (recipes.built("thing") / "image").read_text() == "one\n"
    first = recipes.built("thing")
    assert (tmp_path / "log").read_text() == "built\n"
    (recipe.parent / "source").write_text("a source that the build reads")
    assert recipes.built("thing") != first
    assert (tmp_path / "log").read_text() == "built\n" * 2


def test_a_recipe_built_by_several_at_once_is_built_once(recipe: Path, tmp_path: Path) -> None:
    write(recipe, f'echo built >>{tmp_path}/log; sleep 0.2; echo one >"$1/image"')
    with ThreadPoolExecutor(4) as pool:
        folders = {future.result() for future in [pool.submit(recipes.built, "thing") for _ in range(4)]}
    assert len(folders) == 1
    assert (tmp_path / "log").read_text() == "built\n"


def test_a_recipe_that_fails_leaves_nothing(recipe: Path, tmp_path: Path) -> None:
    write(recipe, 'echo half >"$1/image"; echo first; echo the reason >&2; exit 3')
    with pytest.raises(LabError, match="build exited 3: the reason") as failure:
        recipes.built("thing")
    assert failure.value.__notes__ == ["first\nthe reason"]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thing.lock"]


@pytest.mark.usefixtures("recipe")
def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(LabUnavailableError, match=r"recipe .*/vm-images/other/build does not exist"):
        recipes.built("other")


def test_missing_recipes_come_with_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRT_SSE_VM_IMAGES", str(tmp_path / "absent"))
    with pytest.raises(LabUnavailableError) as failure:
        recipes.vm_images()
    assert "VIRT_SSE_VM_IMAGES" in failure.value.hint


def test_the_recipes_are_found_in_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRT_SSE_VM_IMAGES", raising=False)
    assert {path.name for path in recipes.vm_images().iterdir()} >= {"boot-sector", "linux-micro"}


def test_the_hash_covers_names_and_contents(tmp_path: Path) -> None:
    hashes = set()
    for name, content in (("a", "1"), ("a", "2"), ("b", "2")):
        folder = tmp_path / f"{name}{content}"
        folder.mkdir()
        (folder / name).write_text(content)
        hashes.add(recipes.recipe_hash(folder))
    assert len(hashes) == 3


def test_the_boot_sector_is_what_its_docstrings_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRT_SSE_LAB_CACHE", str(tmp_path))
    try:
        image, stays = recipes.boot_sector_image(), recipes.boot_sector_image(stays=True)
    except LabUnavailableError as exc:
        pytest.skip(f"{exc}; {exc.hint}")
    content = image.read_bytes()
    assert len(content) == 1 << 20
    assert content[510:512] == b"\x55\xaa"
    assert recipes.BOOT_SECTOR_TEXT in content[:512]
    differing = [
        at for at, (one, other) in enumerate(zip(content, stays.read_bytes(), strict=True)) if one != other
    ]
    assert differing == [509]

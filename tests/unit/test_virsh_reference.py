"""The page about virsh has the tables of commands that an integration test runs, and forgets no command."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from support.folders import REPOSITORY
from support.virsh_cells import Row, table
from support.virsh_verbs import ROWS, SECTIONS, UNRELATED

PAGE = REPOSITORY / "backend/docs/reference/virsh.md"
GENERATED = re.compile(r"(<!-- table: (.*?) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def generated() -> dict[str, str]:
    """The parts of the page that are made from the tables, by title."""
    listed = ", ".join(f"`{verb}`" for verb in sorted(UNRELATED))
    return {title: table(rows) for title, rows in SECTIONS.items()} | {"Other commands": listed}


def test_the_page_has_the_tables(pytestconfig: pytest.Config) -> None:
    wanted = generated()
    before = PAGE.read_text("utf-8")
    page = GENERATED.sub(lambda part: f"{part[1]}{wanted.pop(part[2])}{part[3]}", before)
    assert wanted == {}, "each table has its place on the page"
    if pytestconfig.getoption("--regenerate-golden"):
        PAGE.write_text(page, "utf-8")
    assert PAGE.read_text("utf-8") == page, "pass --regenerate-golden to write the tables"


def commands() -> Iterator[str]:
    """The commands of the installed virsh."""
    said = subprocess.run(["virsh", "help"], check=True, capture_output=True, text=True)
    yield from re.findall(r"^    ([a-z][a-z-]+) ", said.stdout, re.MULTILINE)


def test_no_command_of_virsh_is_forgotten() -> None:
    tried = {row.verb for row in ROWS}
    assert not tried & UNRELATED
    if not shutil.which("virsh"):
        pytest.skip("needs virsh")
    assert set(commands()) - tried - UNRELATED == set()


@pytest.mark.parametrize("row", [row for row in ROWS if row.tests], ids=lambda row: str(row.verb))
def test_rows_that_are_not_run_name_their_tests(row: Row) -> None:
    texts = {}
    for name, module in row.tests.items():
        texts[module] = (REPOSITORY / "tests" / module).read_text("utf-8")
        assert f"\ndef {name}(" in texts[module]
    for cell in row.cells.values():
        assert any(cell.says in text for text in texts.values())

"""The reference of the command line and the man pages agree with the commands."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import typer

from virt_sse.cli import reference, roff
from virt_sse.cli.main import build
from virt_sse.config import Config
from virt_sse.plugins import PluginHost

CHECKOUT = Path(__file__).parents[3]
PAGE = CHECKOUT / "backend/docs/reference/cli.md"
ROOT = reference.command_line()


def test_the_page_is_up_to_date(request: pytest.FixtureRequest) -> None:
    text = reference.markdown(ROOT)
    if request.config.getoption("--regenerate-golden"):
        PAGE.write_text(text, "utf-8")
    assert text == PAGE.read_text("utf-8"), "run pytest --regenerate-golden on this file"


def test_nothing_in_the_page_is_of_this_machine() -> None:
    text = reference.markdown(ROOT) + "".join(roff.man_pages(ROOT).values())
    for path in (CHECKOUT, Path.home(), Path(sys.prefix)):
        assert str(path) not in text


def test_every_command_and_option_is_in_the_reference(tmp_path: Path) -> None:
    def compare(real: typer.core.TyperGroup, described: reference.CommandReference) -> None:
        assert sorted(real.commands) == [each.path[-1] for each in described.commands]
        for name, command in real.commands.items():
            ours = described.find(name)
            assert ours is not None
            if isinstance(command, typer.core.TyperGroup):
                compare(command, ours)
                continue
            shown = [param for param in command.params if not param.hidden]
            options = [param for param in shown if isinstance(param, typer.core.TyperOption)]
            assert sorted(opt for param in options for opt in (*param.opts, *param.secondary_opts)) == sorted(
                opt for option in ours.options for opt in option.names
            )
            assert len(ours.arguments) == len(shown) - len(options)
            assert [each.required for each in ours.options] == [each.required for each in options]
            for param, parameter in zip(shown, ours.parameters, strict=True):
                if param.metavar:
                    assert param.metavar.removesuffix("...") == parameter.value

    app = build(PluginHost(Config.load(tmp_path), reference.entry_points()))
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    compare(group, ROOT)


def test_every_parameter_has_a_help_text() -> None:
    assert not [
        f"{command.name}: {parameter.names or parameter.value}"
        for command in ROOT.leaves()
        for parameter in command.parameters
        if not parameter.help
    ]


@pytest.mark.skipif(not shutil.which("groff"), reason="needs groff")
@pytest.mark.parametrize("name", roff.man_pages(ROOT))
def test_man_pages_are_valid(name: str, tmp_path: Path) -> None:
    roff.write_man_pages(tmp_path, ROOT)
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-cbou", name],
        cwd=tmp_path,
        env={"LC_ALL": "C", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert "SYNOPSIS" in done.stdout


def test_text_cannot_become_a_request() -> None:
    described = reference.CommandReference(("x",), (".so /etc/passwd", "'a' \\fB \"b\" -c …"))
    page = roff.man_pages(reference.CommandReference((), ("Root.",), (), (described,)))["virt-sse-x.1"]
    assert "\n.so" not in page
    assert "\n'a'" not in page
    assert r"\(aqa\(aq \efB \(dqb\(dq \-c \[u2026]" in page


def test_the_build_requires_all_that_the_commands_import() -> None:
    """The build imports the commands in an environment with these distributions alone."""
    program = "import sys; from virt_sse.cli import reference; reference.command_line(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    by_module = packages_distributions()
    imported = {
        distribution.lower()
        for module in {name.partition(".")[0] for name in done.stdout.split()}
        for distribution in by_module.get(module, ())
    }
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))
    required = {_name(each) for each in project["build-system"]["requires"]}
    required |= {_name(each) for name in required for each in _requirements(name)}
    optional = {"typing_extensions"}  # imported by msgspec where installed
    assert imported - required - optional - {"virt-sse"} - _loaded_at_start() == set()


def _requirements(distribution: str) -> list[str]:
    try:
        return [each for each in requires(distribution) or () if "extra ==" not in each]
    except PackageNotFoundError:
        return []


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found
    return found[0].lower()


def _loaded_at_start() -> set[str]:
    """Distributions whose ``.pth`` files import modules in every process."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys; print(*sys.modules)"], capture_output=True, text=True, check=True
    )
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    return {each.lower() for module in modules for each in packages_distributions().get(module, ())}

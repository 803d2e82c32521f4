"""What all commands have in common: ``-h``, placeholders, an example, global options, usage errors."""

from __future__ import annotations

import contextlib
import io
import re
import shlex

import pytest

from support.command_line import CommandLine
from support.command_tree import commands, root
from virt_sse.cli import global_options
from virt_sse.cli.examples import example

ALL = dict(commands(root()))


def said(*arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        root().main(list(arguments), prog_name="virt-sse", standalone_mode=False)
    return out.getvalue()


@pytest.mark.parametrize("path", [(), *ALL], ids=" ".join)
def test_help_fits_80_columns_and_shows_placeholders(path: tuple[str, ...]) -> None:
    text = said(*path, "-h")
    assert text == said(*path, "--help")
    usage = text.partition("\n\n")[0]
    assert "{" not in usage
    assert not re.findall(r"<(?:str|path|int|float|datetime)\b", text)
    for line in text.splitlines():
        assert len(line) <= 80 or "|" in line or line.startswith("  virt-sse "), line


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_every_command_has_an_example_that_its_parser_takes(path: tuple[str, ...]) -> None:
    line = ALL[path].epilog or example(path)
    assert line, "add an example to cli/examples.py"
    assert line in said(*path, "-h")
    words = shlex.split(line)
    assert words[: len(path) + 1] == ["virt-sse", *path]
    ALL[path].make_context(" ".join(path), words[len(path) + 1 :])


def test_every_value_has_a_placeholder_in_capitals() -> None:
    for path, command in ALL.items():
        for parameter in command.params:
            if parameter.metavar is not None and "|" not in parameter.metavar:
                assert re.fullmatch(r"[A-Z][A-Z:=,\[\].-]*", parameter.metavar), (path, parameter.metavar)


def test_no_command_has_an_option_of_its_own_with_a_global_spelling() -> None:
    spellings = {each for names in global_options.DECLARATIONS.values() for each in names}
    for path, command in ALL.items():
        given = [opt for parameter in command.params for opt in parameter.opts]
        assert sorted(given) == sorted(set(given)), path
        assert spellings <= set(given), path


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        ("disk create", "missing argument 'NAME'", "virt-sse disk create"),
        ("des create x", "missing option '--key'", "virt-sse des create"),
        ("disk lis", "no such command 'lis'. Did you mean 'list'?", "virt-sse disk"),
        ("nouns", "no such command 'nouns'", "virt-sse"),
        (
            "disk create x --siz 1",
            "no such option: --siz (Possible options: --des, --size, --sku)",
            "virt-sse disk create",
        ),
        (
            "disk list -o xml",
            "invalid value for '--output' / '-o': 'xml' is not one of 'table', 'json'",
            "virt-sse disk list",
        ),
        ("disk show a b", "got unexpected extra arguments (b)", "virt-sse disk show"),
        (
            "vault serve --port x",
            "invalid value for '--port': 'x' is no whole number",
            "virt-sse vault serve",
        ),
        ("disk create x --size", "option '--size' requires an argument", "virt-sse disk create"),
        ("disk resize a", "missing argument 'SIZE'", "virt-sse disk resize"),
    ],
)
def test_a_usage_error_is_one_line_and_a_hint(
    virt_sse: CommandLine, arguments: str, message: str, command: str
) -> None:
    expected = f"virt-sse: error: {message}\nvirt-sse: hint: try '{command} -h'\n"
    assert virt_sse.refuses(*arguments.split(), status=2) == expected


def test_global_options_stand_anywhere(virt_sse: CommandLine) -> None:
    for arguments in (("--quiet", "--debug", "disk", "list"), ("-q", "disk", "list", "-v")):
        assert "--quiet excludes" in virt_sse.refuses(*arguments, status=2)

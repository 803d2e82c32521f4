"""The reference of the command line, made from the commands themselves.

``python -m virt_sse.cli.reference`` prints ``backend/docs/reference/cli.md``; :mod:`virt_sse.cli.roff` has
the man pages. Commands of other distributions' plugins are left out: the result is the same on every machine.
"""

from __future__ import annotations

import enum
import importlib.metadata
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import typer
from typer.models import ArgumentInfo, OptionInfo

from virt_sse.cli import confirmation
from virt_sse.cli.command_tree import placeholder
from virt_sse.cli.examples import example
from virt_sse.cli.main import build
from virt_sse.config import Config
from virt_sse.plugins import ENTRY_POINT_GROUP, PluginHost

PROGRAM = "virt-sse"
EXIT_STATUSES = {
    "0": "Success.",
    "1": "An error; also a fault found by a command that looks for faults, as 'host doctor' and 'vm verify'.",
    "2": "Wrong usage: an unknown option, an invalid name or size, a missing argument.",
    "130": "Interrupted by Ctrl-C.",
}
"""Exit statuses and their meanings, of all commands."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """An argument or an option of a command.

    :ivar names: the spellings of an option, e.g. ``--output`` and ``-o``; empty for an argument.
    :ivar value: the placeholder of its value, or the values to choose from; empty for a flag.
    :ivar help: its help text.
    :ivar required: whether a command without this parameter is a usage error.
    :ivar repeated: whether several values may be given.
    :ivar default: the default as the help shows it, if there is a default.
    :ivar environment: the environment variable with the same meaning, if there is such a variable.
    :ivar limits: the range of a number, e.g. ``1 to 900``.
    """

    names: tuple[str, ...]
    value: str
    help: str
    required: bool
    repeated: bool
    default: str | None
    environment: str | None
    limits: str | None

    @property
    def details(self) -> str:
        """Default, range and the like in one line; may be empty."""
        parts = [
            "required" if self.required and self.names else None,
            "can be repeated" if self.repeated and self.names and "repeated" not in self.help else None,
            f"range: {self.limits}" if self.limits else None,
            f"default: {self.default}" if self.default else None,
            f"environment variable: {self.environment}" if self.environment else None,
        ]
        return "; ".join(part for part in parts if part)


_CONFIRMATION = tuple(
    Parameter(spellings, "", text, False, False, None, None, None)
    for spellings, text in confirmation.DECLARATIONS.values()
)
"""The options of all commands that destroy."""


@dataclass(frozen=True, slots=True)
class CommandReference:
    """A command, or a group of commands.

    :ivar path: the words that call the command, e.g. ``("disk", "create")``; empty for ``virt-sse`` itself.
    :ivar help: paragraphs of its help text; the first is the summary.
    :ivar example: a command line; ``None`` for a group.
    :ivar commands: the commands of a group; empty for a command that does something.
    """

    path: tuple[str, ...]
    help: tuple[str, ...]
    parameters: tuple[Parameter, ...] = ()
    commands: tuple[CommandReference, ...] = ()
    example: str | None = None

    @property
    def name(self) -> str:
        """The whole command, e.g. ``virt-sse disk create``."""
        return " ".join((PROGRAM, *self.path))

    @property
    def arguments(self) -> list[Parameter]:
        return [each for each in self.parameters if not each.names]

    @property
    def options(self) -> list[Parameter]:
        return [each for each in self.parameters if each.names]

    def find(self, name: str) -> CommandReference | None:
        """The command *name* of this group."""
        return next((each for each in self.commands if each.path[-1] == name), None)

    def leaves(self) -> Iterator[CommandReference]:
        """All commands of this group and of the groups in this group."""
        for each in self.commands:
            if each.commands:
                yield from each.leaves()
            else:
                yield each


def entry_points() -> list[importlib.metadata.EntryPoint]:
    """The plugins that come with virt-sse."""
    return [
        each
        for each in importlib.metadata.distribution(PROGRAM).entry_points
        if each.group == ENTRY_POINT_GROUP
    ]


def command_line(plugins: Iterable[importlib.metadata.EntryPoint] | None = None) -> CommandReference:
    """The root of the command line.

    :param plugins: entry points of the plugins that may add commands; default :func:`entry_points`.
    """
    nowhere = Config.load(Path("/nonexistent"))
    app = build(PluginHost(nowhere, entry_points() if plugins is None else plugins))
    root = app.registered_callback
    parameters = _parameters(root.callback) if root and root.callback else ()
    return CommandReference((), _paragraphs(app.info.help), parameters, _commands(app, ()))


def _commands(app: typer.Typer, path: tuple[str, ...]) -> tuple[CommandReference, ...]:
    found = []
    for command in app.registered_commands:
        if command.callback and not command.hidden:
            name = command.name or command.callback.__name__.lower().replace("_", "-")
            text = command.help or inspect.getdoc(command.callback)
            inner = (*path, name)
            is_destructive = command.cls is confirmation.DestructiveCommand
            found.append(
                CommandReference(
                    inner,
                    _paragraphs(text),
                    _parameters(command.callback) + (_CONFIRMATION if is_destructive else ()),
                    example=command.epilog or example(inner),
                )
            )
    for group in app.registered_groups:
        if group.typer_instance and not group.hidden:
            if not isinstance(group.name, str):  # its commands are commands of this group
                found += _commands(group.typer_instance, path)
                continue
            inner = (*path, group.name)
            text = group.help if isinstance(group.help, str) else group.typer_instance.info.help
            found.append(
                CommandReference(inner, _paragraphs(text), (), _commands(group.typer_instance, inner))
            )
    return tuple(sorted(found, key=lambda each: each.path))


def _paragraphs(text: object) -> tuple[str, ...]:
    if not isinstance(text, str):
        return ()
    return tuple(" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip())


def _parameters(callback: object) -> tuple[Parameter, ...]:
    """The parameters of a command's function, from its signature."""
    assert callable(callback)  # noqa: S101 -- typer registers nothing else
    hints = typing.get_type_hints(callback, include_extras=True)
    found = []
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, *annotations = typing.get_args(hints[name]) or (hints[name],)
        info = next((each for each in annotations if isinstance(each, OptionInfo | ArgumentInfo)), None)
        if info is not None and not info.hidden:
            found.append(_parameter(name, kind, info, parameter.default))
    return tuple(found)


def _parameter(name: str, kind: object, info: OptionInfo | ArgumentInfo, default: object) -> Parameter:
    required = default is inspect.Parameter.empty
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    single = next(each for each in kinds if each is not types.NoneType)
    repeated = typing.get_origin(single) in (list, tuple)
    if repeated:
        single = typing.get_args(single)[0]
    is_flag = single is bool
    # In Annotated, the first declaration is the first parameter of typer.Option, its default.
    first = (info.default,) if isinstance(info.default, str) else ()
    declarations = [name for each in (*first, *(info.param_decls or ())) for name in each.split("/")]
    if isinstance(info, ArgumentInfo):
        names: list[str] = []
    else:
        spelling = name.replace("_", "-")
        names = declarations or [f"--{spelling}", *([f"--no-{spelling}"] if is_flag else [])]
    return Parameter(
        names=tuple(names),
        value="" if is_flag else _placeholder(name, names[0] if names else "", single, info),
        help=" ".join((info.help or "").split()),
        required=required,
        repeated=repeated,
        default=_default(default, info),
        environment=info.envvar if isinstance(info.envvar, str) else None,
        limits=_limits(info),
    )


def _placeholder(name: str, option: str, kind: object, info: OptionInfo | ArgumentInfo) -> str:
    if info.metavar:
        return info.metavar
    if isinstance(info, ArgumentInfo):
        return name.upper().replace("_", "-")
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(str(each.value) for each in kind)
    if kind in (int, float):
        return "N"
    if kind is datetime:
        return "TIME"
    return "PATH" if kind is Path else placeholder(option)


def _default(default: object, info: OptionInfo | ArgumentInfo) -> str | None:
    if isinstance(info.show_default, str):
        return info.show_default
    if not info.show_default or default in (None, False, inspect.Parameter.empty):
        return None
    return str(default.value if isinstance(default, enum.Enum) else default)


def _limits(info: OptionInfo | ArgumentInfo) -> str | None:
    if info.min is None and info.max is None:
        return None
    if info.max is None:
        return f"{info.min} or more"
    return f"{info.min} to {info.max}" if info.min is not None else f"{info.max} or less"


def usage(command: CommandReference) -> str:
    parts = [command.name]
    parts += [f"{each.names[0]} {each.value}" for each in command.options if each.required]
    if not all(each.required for each in command.options):
        parts.append("[OPTIONS]")
    for each in command.arguments:
        value = each.value + ("..." if each.repeated else "")
        parts.append(value if each.required else f"[{value}]")
    return " ".join(parts)


def sentence(parameter: Parameter) -> str:
    details = f" ({parameter.details})" if parameter.details else ""
    return parameter.help + details


# Markdown


def markdown(root: CommandReference) -> str:
    """The whole reference as a Markdown page."""
    lines = [
        "# Command line",
        "",
        "<!-- Generated by `python -m virt_sse.cli.reference`. Do not edit. -->",
        "",
        *_markdown_help(root),
        "`virt-sse NOUN VERB -h` prints the same texts. Each noun has a man page: `man virt-sse-disk`.",
        "Plugins of a site can add commands.",
        "",
        "The exit status is one of:",
        "",
        "| status | meaning |",
        "|---|---|",
        *(f"| {status} | {_cell(meaning)} |" for status, meaning in EXIT_STATUSES.items()),
        "",
        "The options of `virt-sse` itself can be given before or behind the words of any command:",
        "",
        *_markdown_parameters("option", root.options),
        "| noun | purpose |",
        "|---|---|",
    ]
    for noun in root.commands:
        lines.append(f"| [`{noun.name}`](#{_slug(noun.name)}) | {_cell(noun.help[0])} |")
    for noun in root.commands:
        lines += ["", f"## {noun.name}", ""]
        if not noun.commands:
            lines += _markdown_command(noun)
            continue
        lines += [*_markdown_help(noun), "| command | purpose |", "|---|---|"]
        leaves = list(noun.leaves())
        for each in leaves:
            lines.append(f"| [`{each.name}`](#{_slug(each.name)}) | {_cell(each.help[0])} |")
        for each in leaves:
            lines += ["", f"### {each.name}", "", *_markdown_command(each)]
    return "\n".join(lines) + "\n"


def _markdown_command(command: CommandReference) -> list[str]:
    lines = [*_markdown_help(command), "```", usage(command), "```", ""]
    lines += ["For example:", "", "```", command.example, "```", ""] if command.example else []
    lines += _markdown_parameters("argument", command.arguments)
    lines += _markdown_parameters("option", command.options)
    return lines[:-1]  # each of these ends with an empty line


def _markdown_help(command: CommandReference) -> list[str]:
    return [line for paragraph in command.help for line in (_text(paragraph), "")]


def _markdown_parameters(title: str, parameters: Sequence[Parameter]) -> list[str]:
    if not parameters:
        return []
    lines = [f"| {title} | meaning |", "|---|---|"]
    for each in parameters:
        value = each.value + ("..." if each.repeated and not each.names else "")
        label = ", ".join(f"`{name}`" for name in each.names) + (" " if each.names else "")
        label += f"`{value}`" if value else ""
        lines.append(f"| {_escape_bars(label.strip())} | {_cell(sentence(each))} |")
    return [*lines, ""]


def _slug(name: str) -> str:
    """The anchor that code hosting sites give a heading *name*."""
    return name.lower().replace(" ", "-")


def _text(text: str) -> str:
    return re.sub(r"([*_<>\[\]`])", r"\\\1", text)


def _cell(text: str) -> str:
    return _escape_bars(_text(text))


def _escape_bars(text: str) -> str:
    return text.replace("|", r"\|")


if __name__ == "__main__":
    sys.stdout.write(markdown(command_line()))

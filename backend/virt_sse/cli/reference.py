"""The reference of the command line, as Markdown and as man pages.

Both are written from the commands themselves: ``python -m virt_sse.cli.reference markdown`` prints
``backend/docs/reference/cli.md``, ``python -m virt_sse.cli.reference man DIRECTORY`` writes the man pages.
:mod:`virt_sse.cli.man_pages` puts the man pages into the wheel. Commands of other distributions' plugins are
    left out, so
the result is the same on every machine.
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
from pathlib import Path

import typer
from typer.models import ArgumentInfo, OptionInfo

import virt_sse
from virt_sse.cli.main import build
from virt_sse.config import Config
from virt_sse.plugins import ENTRY_POINT_GROUP, PluginHost
from virt_sse.system.files import shared_folder, write_shared

_PROGRAM = "virt-sse"
_TYPES = {str: "TEXT", int: "INTEGER", float: "NUMBER", Path: "PATH"}


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


@dataclass(frozen=True, slots=True)
class CommandReference:
    """A command, or a group of commands.

    :ivar path: the words that call the command, e.g. ``("disk", "create")``; empty for ``virt-sse`` itself.
    :ivar help: paragraphs of its help text; the first is the summary.
    :ivar commands: the commands of a group; empty for a command that does something.
    """

    path: tuple[str, ...]
    help: tuple[str, ...]
    parameters: tuple[Parameter, ...] = ()
    commands: tuple[CommandReference, ...] = ()

    @property
    def name(self) -> str:
        """The whole command, e.g. ``virt-sse disk create``."""
        return " ".join((_PROGRAM, *self.path))

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
        for each in importlib.metadata.distribution(_PROGRAM).entry_points
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
            found.append(CommandReference((*path, name), _paragraphs(text), _parameters(command.callback)))
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
        value="" if is_flag else _placeholder(name, single, info),
        help=" ".join((info.help or "").split()),
        required=required,
        repeated=repeated,
        default=_default(default, info),
        environment=info.envvar if isinstance(info.envvar, str) else None,
        limits=_limits(info),
    )


def _placeholder(name: str, kind: object, info: OptionInfo | ArgumentInfo) -> str:
    if info.metavar:
        return info.metavar
    if isinstance(info, ArgumentInfo):
        return name.upper().replace("_", "-")
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "|".join(str(each.value) for each in kind)
    return _TYPES.get(typing.cast("type", kind), "VALUE")


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


def _usage(command: CommandReference) -> str:
    parts = [command.name]
    parts += [f"{each.names[0]} {each.value}" for each in command.options if each.required]
    if not all(each.required for each in command.options):
        parts.append("[OPTIONS]")
    for each in command.arguments:
        value = each.value + ("..." if each.repeated else "")
        parts.append(value if each.required else f"[{value}]")
    return " ".join(parts)


def _sentence(parameter: Parameter) -> str:
    details = f" ({parameter.details})" if parameter.details else ""
    return parameter.help + details


# Markdown


def markdown(root: CommandReference) -> str:
    """The whole reference as a Markdown page."""
    lines = [
        "# Command line",
        "",
        "<!-- Generated by `python -m virt_sse.cli.reference markdown`. Do not edit. -->",
        "",
        *_markdown_help(root),
        "`virt-sse NOUN VERB --help` prints the same texts. Each noun has a man page: `man virt-sse-disk`.",
        "Plugins of a site can add commands. The exit status is 0, or 1 for an error, or 2 for wrong usage.",
        "",
        *_markdown_parameters("option", root.options),
        "| noun | purpose |",
        "|---|---|",
    ]
    for noun in root.commands:
        lines.append(f"| [`{noun.name}`](#{_slug(noun.name)}) | {_cell(noun.help[0])} |")
    for noun in root.commands:
        lines += ["", f"## {noun.name}", "", *_markdown_help(noun)]
        lines += ["| command | purpose |", "|---|---|"]
        leaves = list(noun.leaves())
        for each in leaves:
            lines.append(f"| [`{each.name}`](#{_slug(each.name)}) | {_cell(each.help[0])} |")
        for each in leaves:
            lines += ["", f"### {each.name}", "", *_markdown_help(each)]
            lines += ["```", _usage(each), "```", ""]
            lines += _markdown_parameters("argument", each.arguments)
            lines += _markdown_parameters("option", each.options)
            lines.pop()  # each of these ends with an empty line
    return "\n".join(lines) + "\n"


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
        lines.append(f"| {_escape_bars(label.strip())} | {_cell(_sentence(each))} |")
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


# Man pages


def man_pages(root: CommandReference) -> dict[str, str]:
    """The man pages by file name: ``virt-sse.1``, and a page for each noun."""
    pages = {f"{_PROGRAM}.1": _root_page(root)}
    for noun in root.commands:
        pages[f"{'-'.join((_PROGRAM, *noun.path))}.1"] = _noun_page(noun)
    return pages


def _root_page(root: CommandReference) -> str:
    lines = [*_head(root), ".SH SYNOPSIS", f".B {_roff(_PROGRAM)}", r"\fINOUN VERB\fR [\fIOPTIONS\fR]"]
    lines += [".SH DESCRIPTION", *_roff_help(root)]
    lines += [".SH NOUNS"]
    for noun in root.commands:
        lines += [".TP", rf"\fB{_roff(noun.path[-1])}\fR", _roff(noun.help[0])]
    lines += [".SH OPTIONS", *_roff_parameters(root.options)]
    lines += [".SH EXIT STATUS", *_tagged([("0", "Success."), ("1", "An error."), ("2", "Wrong usage.")])]
    lines += [".SH ENVIRONMENT"]
    lines += _tagged(
        [
            ("VIRT_SSE_ROOT", "A folder for everything that otherwise lies in /etc, /var and /run."),
            ("LIBVIRT_DEFAULT_URI", "The libvirt connection; overrides the configuration."),
        ]
    )
    lines += [".SH FILES"]
    lines += _tagged([("/etc/virt-sse/config.toml", "The configuration. All options are optional.")])
    lines += [".SH SEE ALSO"]
    names = ["-".join((_PROGRAM, *noun.path)) for noun in root.commands] + ["virsh"]
    lines.append(",\n".join(rf"\fB{_roff(name)}\fR(1)" for name in names))
    return "\n".join(lines) + "\n"


def _noun_page(noun: CommandReference) -> str:
    lines = [*_head(noun), ".SH SYNOPSIS"]
    for each in noun.leaves():
        words = _usage(each).removeprefix(each.name).strip()
        lines += [rf"\fB{_roff(each.name)}\fR {_roff(words)}", ".br"]
    lines[-1:] = [".SH DESCRIPTION", *_roff_help(noun), ".SH COMMANDS"]
    for each in noun.leaves():
        lines += [f".SS {_roff(' '.join(each.path))}", *_roff_help(each)]
        lines += _roff_parameters([*each.arguments, *each.options])
    lines += [".SH SEE ALSO", rf"\fB{_roff(_PROGRAM)}\fR(1)"]
    return "\n".join(lines) + "\n"


def _head(command: CommandReference) -> list[str]:
    name = "-".join((_PROGRAM, *command.path))
    title = f'.TH {_roff(name.upper())} 1 "" "virt\\-sse {virt_sse.__version__}" "virt\\-sse"'
    return [title, ".SH NAME", rf"{_roff(name)} \- {_roff(command.help[0].rstrip('.'))}"]


def _roff_help(command: CommandReference) -> list[str]:
    return [
        line for number, text in enumerate(command.help) for line in ([".PP"] * bool(number) + [_roff(text)])
    ]


def _roff_parameters(parameters: Sequence[Parameter]) -> list[str]:
    lines = []
    for each in parameters:
        label = ", ".join(rf"\fB{_roff(name)}\fR" for name in each.names) + (" " if each.names else "")
        dots = "..." if each.repeated and not each.names else ""
        label += rf"\fI{_roff(each.value)}\fR{dots}" if each.value else ""
        lines += [".TP", label.strip(), _roff(_sentence(each)) or r"\&"]
    return lines


def _tagged(entries: Iterable[tuple[str, str]]) -> list[str]:
    return [line for tag, text in entries for line in (".TP", rf"\fB{_roff(tag)}\fR", _roff(text))]


def _roff(text: str) -> str:
    """*text* for groff and mandoc, in ASCII; no line of the result is a request."""
    text = text.replace("\\", r"\e").replace("-", r"\-").replace("'", r"\(aq").replace('"', r"\(dq")
    text = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in text)
    return rf"\&{text}" if text.startswith(".") else text


def main(arguments: Sequence[str]) -> None:
    """Print the Markdown page, or write the man pages into a directory."""
    match arguments:
        case ["markdown"]:
            sys.stdout.write(markdown(command_line()))
        case ["man", directory]:
            write_man_pages(Path(directory), command_line())
        case _:
            sys.exit("usage: python -m virt_sse.cli.reference markdown | man DIRECTORY")


def write_man_pages(directory: Path, root: CommandReference) -> list[Path]:
    """Write the man pages into *directory*, and create the directory if necessary; the files' paths."""
    shared_folder(directory)
    paths = []
    for name, page in man_pages(root).items():
        write_shared(directory / name, page.encode("ascii"))
        paths.append(directory / name)
    return paths


if __name__ == "__main__":
    main(sys.argv[1:])

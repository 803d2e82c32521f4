"""What all commands have in common: help texts, placeholders, global options and usage errors.

typer makes the commands; the classes here replace typer's, also for the commands of plugins.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from virt_sse.cli import global_options
from virt_sse.cli.examples import example
from virt_sse.errors import InvalidValueError, VirtSseError, report

_USAGE = 2
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""click's ``UsageError``, of which typer has a copy."""
_ANY_ERROR: type[Exception] = typer.BadParameter.__mro__[2]
"""click's ``ClickException``, likewise."""
_OF_NAMES = {"des": "SET"}
"""Placeholders of options whose name is no word for their value."""


def placeholder(option: str) -> str:
    """The placeholder for the text that *option* takes: ``--source-format FORMAT``."""
    name = option.lstrip("-")
    return _OF_NAMES.get(name) or name.rpartition("-")[2].upper()


class HelpfulCommand(TyperCommand):
    """A command, with the global options, with an example in its help."""

    def __init__(self, *arguments: Any, params: list[Any] | None = None, **options: Any) -> None:
        super().__init__(*arguments, params=_completed(params), **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments (click)."""
        with _error_of(ctx):
            return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """The words of the usage line; typer puts required arguments into braces (click)."""
        return [re.sub(r"^\{(.*)\}$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example and the global options below the options (click)."""
        if text := self.epilog or example(ctx.command_path.split()[1:]):
            with formatter.section("Example"):
                formatter.write(f"  {text}\n")
        _write_global_options(formatter)


class HelpfulGroup(TyperGroup):
    """A group of commands; without a command, its help is printed as a usage error."""

    def __init__(self, *arguments: Any, params: list[Any] | None = None, **options: Any) -> None:
        super().__init__(*arguments, params=_completed(params), **options)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the options in front of the command (click)."""
        if not args and self.no_args_is_help and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(_USAGE)
        with _error_of(ctx):
            return super().parse_args(ctx, args)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the global options below the commands (click)."""
        if ctx.parent is not None:
            _write_global_options(formatter)


@contextlib.contextmanager
def _error_of(ctx: Any) -> Iterator[None]:
    """Note the command in usage errors: an option without its value has none."""
    try:
        yield
    except _USAGE_ERROR as exc:
        error: Any = exc
        error.ctx = error.ctx or ctx
        raise


def _write_global_options(formatter: Any) -> None:
    names = ", ".join(spellings[0] for spellings in global_options.DECLARATIONS.values())
    formatter.write_paragraph()
    formatter.write_text(f"Options of all commands, see 'virt-sse -h': {names}.")


def _completed(params: list[Any] | None) -> list[Any]:
    """Parameters with placeholders, and with the global options unless they are among the parameters."""
    completed = list(params or ())
    names = set()
    for each in completed:
        names |= {*each.opts, *each.secondary_opts}
        if each.metavar is None:
            each.metavar = _metavar(each)
    return completed + [each for each in _shared() if names.isdisjoint(each.opts)]


def _metavar(parameter: Any) -> str | None:
    """The placeholder of an argument's or option's value; ``None`` for a flag and for a choice."""
    if isinstance(parameter, TyperArgument):
        name = str(parameter.name).upper().replace("_", "-")
        return name if parameter.nargs == 1 else f"{name}..."
    if not isinstance(parameter, TyperOption) or parameter.is_flag or parameter.count:
        return None
    kind = parameter.type.name.partition(" ")[0]
    if kind in ("int", "float"):
        return "N"
    return {"str": placeholder(parameter.opts[0]), "path": "PATH", "datetime": "TIME"}.get(kind)


_options: list[TyperOption] = []


def _shared() -> list[TyperOption]:
    """The global options; the same objects for all commands, because there are many commands."""
    if not _options:
        _options.extend(
            TyperOption(
                param_decls=list(spellings),
                is_flag=True,
                default=False,
                expose_value=False,
                hidden=True,
                callback=global_options.choose,
            )
            for spellings in global_options.DECLARATIONS.values()
        )
    return _options


def use_classes(app: typer.Typer) -> None:
    """Let typer make the commands of *app* with the classes of this module."""
    app.info.cls = HelpfulGroup
    for command in app.registered_commands:
        if command.cls in (None, TyperCommand):
            command.cls = HelpfulCommand
    for group in app.registered_groups:
        if group.typer_instance:
            if isinstance(group.name, str):
                group.cls = HelpfulGroup
            use_classes(group.typer_instance)


def run(app: typer.Typer) -> int:
    """Run the command named by the arguments of this process: its exit status.

    :raise VirtSseError: When the command fails.
    """
    try:
        status = typer.main.get_command(app).main(prog_name="virt-sse", standalone_mode=False)
    except _USAGE_ERROR as exc:
        report(_usage_error(exc))
        return _USAGE
    except _ANY_ERROR as exc:
        raise VirtSseError(_sentence(exc)) from exc
    except typer.Abort:
        raise VirtSseError("aborted") from None
    return status if isinstance(status, int) else 0


def _usage_error(exc: Any) -> InvalidValueError:
    command = exc.ctx.command_path if exc.ctx else "virt-sse"
    return InvalidValueError(_sentence(exc), hint=f"try '{command} -h'")


def _sentence(exc: Any) -> str:
    """The message of typer in our form: one line, lowercase, without a full stop."""
    text = " ".join(str(exc.format_message()).split()).rstrip(".")
    text = text.replace("extra argument(s)", "extra arguments")
    text = re.sub(r"is not a valid int( range)?$", "is no whole number", text)
    text = re.sub(r"is not a valid float( range)?$", "is no number", text)
    return text[:1].lower() + text[1:]

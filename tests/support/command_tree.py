"""The commands of ``virt-sse`` as typer builds them, those of plugins included."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import typer.main
from typer.core import TyperCommand, TyperGroup

from virt_sse.cli import reference
from virt_sse.cli.main import build
from virt_sse.config import Config
from virt_sse.plugins import PluginHost


@cache
def root() -> TyperGroup:
    """The group of all commands."""
    app = build(PluginHost(Config.load(Path("/nonexistent")), reference.entry_points()))
    command = typer.main.get_command(app)
    assert isinstance(command, TyperGroup)
    return command


def commands(group: TyperGroup, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], TyperCommand]]:
    """All commands below *group* that are no groups, each with its words."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, (*path, name))
        else:
            assert isinstance(command, TyperCommand)
            yield (*path, name), command

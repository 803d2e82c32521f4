"""What a command of virsh does with each kind of disk: cells, rows, and their table in Markdown."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field


class Kind(enum.Enum):
    """A kind of disk."""

    SINGLE_RAW = "single raw"
    SINGLE_QCOW2 = "single qcow2"
    DOUBLE_RAW = "double raw"
    DOUBLE_QCOW2 = "double qcow2"
    AT_HOST = "at host"
    """A single qcow2 disk with a host cache, in a domain with encryption at host."""


_GROUPS = {
    "single": {Kind.SINGLE_RAW, Kind.SINGLE_QCOW2},
    "raw": {Kind.SINGLE_RAW, Kind.DOUBLE_RAW},
    "qcow2": {Kind.SINGLE_QCOW2, Kind.DOUBLE_QCOW2, Kind.AT_HOST},
    "staged": {Kind.DOUBLE_RAW, Kind.DOUBLE_QCOW2, Kind.AT_HOST},
    "double": {Kind.DOUBLE_RAW, Kind.DOUBLE_QCOW2},
} | {kind.name.lower(): {kind} for kind in Kind}


class Outcome(enum.Enum):
    """The word in a cell of the page."""

    WORKS = "works"
    REFUSED = "refused"
    PLAINTEXT = "**plaintext**"
    HARM = "**harm**"
    """The guest ends, or the disk is damaged or gone."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a command does on one kind of disk.

    :ivar says: a text in the command's output.
    :ivar event: the agent's log event that tells, with some of its values.
    :ivar tells: a command that tells, and a text in its output.
    :ivar state: the domain's state afterwards; default: the row's.
    """

    outcome: Outcome
    says: str = ""
    event: tuple[str, Mapping[str, str]] | None = None
    tells: tuple[str, str] | None = None
    state: str = ""

    @property
    def reason(self) -> str:
        """The reason of a refusal, or who tells; in the words of the page."""
        if self.outcome is Outcome.REFUSED:
            return f"refused: “{self.says}”"
        found = []
        if self.event:
            name, values = self.event
            details = "".join(f", {key} “{value}”" for key, value in values.items())
            found.append(f"the agent (`{name}`{details})")
        if self.tells:
            found.append(f"`{self.tells[0]}`")
        if found:
            return " and ".join(found) + (" tells" if len(found) == 1 else " tell")
        return "nobody tells" if self.outcome is Outcome.PLAINTEXT else ""


@dataclass(frozen=True, slots=True)
class Row:
    """A command, with what it does on each kind of disk.

    :ivar command: as typed after ``virsh``.
    :ivar state: the domain's state afterwards.
    :ivar before: commands that lead to the tested one.
    :ivar after: commands that take back what the command did.
    :ivar tests: names of the tests that hold the row, by module, if the row is not run itself.
    """

    command: str
    cells: Mapping[Kind, Cell]
    remark: str = ""
    state: str = "running"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    tests: Mapping[str, str] = field(default_factory=dict)

    @property
    def verb(self) -> str:
        return self.command.split()[0]


def row(
    command: str,
    cell: Cell,
    remark: str = "",
    *,
    state: str = "running",
    before: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    tests: Mapping[str, str] | None = None,
    **others: Cell,
) -> Row:
    """A row whose cells are *cell*, except for the kinds or groups of kinds in *others*."""
    cells = dict.fromkeys(Kind, cell)
    for group, other in others.items():
        cells |= dict.fromkeys(_GROUPS[group], other)
    return Row(command, cells, remark, state, before, after, tests or {})


WORKS = Cell(Outcome.WORKS)


def works(says: str = "", *, state: str = "", event: str = "", tells: tuple[str, str] | None = None) -> Cell:
    return Cell(Outcome.WORKS, says, (event, {}) if event else None, tells, state)


def refused(says: str, *, state: str = "") -> Cell:
    return Cell(Outcome.REFUSED, says, state=state)


def plaintext(*, event: str = "", tells: tuple[str, str] | None = None, **values: str) -> Cell:
    return Cell(Outcome.PLAINTEXT, "", (event, values) if event else None, tells)


def harm(says: str = "", *, state: str = "", event: str = "", tells: tuple[str, str] | None = None) -> Cell:
    return Cell(Outcome.HARM, says, (event, {}) if event else None, tells, state)


def table(rows: Sequence[Row]) -> str:
    """The Markdown table of a section of the page."""
    kinds = " | ".join(kind.value for kind in Kind)
    lines = [f"| command | {kinds} | remark |", "|---" * (len(Kind) + 2) + "|"]
    for each in rows:
        words = " | ".join(each.cells[kind].outcome.value for kind in Kind)
        remark = " ".join((*_reasons(each), each.remark)).strip()
        command = each.command.replace("|", "\\|")
        lines.append(f"| `{command}` | {words} | {remark} |")
    return "\n".join(lines)


def _reasons(row: Row) -> Iterator[str]:
    """Reasons and tellers, each once."""
    for reason in dict.fromkeys(cell.reason for cell in row.cells.values()):
        if reason:
            yield reason[0].upper() + reason[1:] + "."

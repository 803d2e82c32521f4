"""``virt-sse audit``."""

from __future__ import annotations

import contextlib
import json
import re
from collections import deque
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from virt_sse.cli import completion, session
from virt_sse.cli.output import Output, OutputFormat, is_narrow, print_fields, print_json, print_rows
from virt_sse.errors import AuditError, InvalidValueError, printable

if TYPE_CHECKING:
    from virt_sse.audit.log import AuditLog
    from virt_sse.audit.record import AuditEntry, Position

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_COLUMNS = ("time", "result", "action", "key", "disk", "domain", "actor", "correlation", "reason")

LogPath = Annotated[
    Path | None, typer.Option("--log", help="A log other than this host's, e.g. a key vault's audit.jsonl.")
]
MacKey = Annotated[
    Path | None, typer.Option("--mac-key", help="The log's key; default: audit.key beside the log.")
]


@app.command(name="list")
def list_(
    since: Annotated[
        str | None, typer.Option("--since", help="How long ago (90s, 30m, 12h, 7d) or an ISO 8601 time.")
    ] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="PROVIDER:NAME or a key's URL, with or without a version.")
    ] = None,
    disk: Annotated[
        str | None,
        typer.Option(
            "--disk",
            help="The disk's name or id.",
            autocompletion=completion.disks,
        ),
    ] = None,
    refused: Annotated[bool, typer.Option("--refused", help="Only refused uses.")] = False,
    correlation: Annotated[
        str | None, typer.Option("--correlation", help="A correlation id; joins records of host and vault.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only this number of newest uses.")
    ] = None,
    log: LogPath = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """List key uses, oldest first."""
    from virt_sse.audit.record import Result

    entries = _log(log).records(
        since=_time(since) if since else None,
        key=key,
        disk=_disk_id(disk) if disk else None,
        result=Result.REFUSED if refused else None,
        correlation=_uuid(correlation) if correlation else None,
    )
    newest = deque(entries, maxlen=limit)
    if output is OutputFormat.JSON:
        print_json([entry.as_json() for entry in newest])
    else:
        rows = [_row(entry) for entry in newest]
        if is_narrow():
            rows = [row | {"time": f"{row['time'][:19]}Z"} for row in rows]
        print_rows(rows, _COLUMNS, output, wide=("actor", "correlation"))


@app.command()
def tail(
    count: Annotated[int, typer.Option("-n", min=1, help="Number of uses.")] = 10,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Wait for further uses.")] = False,
    log: LogPath = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Print the newest key uses, a line each, or with --output json an object each."""
    with contextlib.suppress(KeyboardInterrupt):
        for entry in _log(log).tail(count, follow=follow):
            if output is OutputFormat.JSON:
                typer.echo(json.dumps(entry.as_json()))
            else:
                typer.echo("  ".join(str(value or "-") for value in _row(entry).values()))


@app.command()
def verify(
    anchor: Annotated[
        str | None,
        typer.Option("--anchor", metavar="SEQ:HASH", help="A position printed by an earlier run."),
    ] = None,
    log: LogPath = None,
    mac_key: MacKey = None,
    output: Output = OutputFormat.TABLE,
) -> None:
    """Check whether records were removed, altered, added or moved. Note the position outside this host."""
    report = _log(log, mac_key).verify(_position(anchor) if anchor else None)
    fields: dict[str, object] = {
        "whole": report.broken is None,
        "records": report.newest.seq,
        "position": str(report.newest),
        "authentic": report.authentic,
        "beyond-head": report.beyond_head,
        "torn": report.torn,
    }
    if broken := report.broken:
        place = {"file": str(broken.path), "line": broken.line, "seq": broken.seq, "reason": broken.reason}
        fields["broken"] = place
        if output is OutputFormat.JSON:
            print_fields(fields, output)
        raise AuditError(
            f"the audit log is not whole: {broken}", hint=f"the {report.newest.seq} records before are whole"
        )
    print_fields(fields, output)


def _log(path: Path | None, mac_key: Path | None = None) -> AuditLog:
    from virt_sse.audit.log import AuditLog

    if path is None:
        return AuditLog.of_host(session.config())
    log = AuditLog(path, key=mac_key)
    if not log.files():
        raise AuditError(f"no audit log {path}")
    return log


def _row(entry: AuditEntry) -> dict[str, str]:
    """The columns of a table, without control characters for a terminal."""
    fields = entry.document
    key, disk = fields["key"] or "", fields["disk"] or ""
    if fields["key-version"]:
        key += ("/" if "://" in key else ":") + fields["key-version"]
    if fields["slot"]:
        disk += "/" + fields["slot"]
    row = {column: fields[column] or "" for column in _COLUMNS} | {"key": key, "disk": disk}
    return {column: printable(text) for column, text in row.items()}


def _time(text: str) -> datetime:
    if match := re.fullmatch(r"(\d{1,9})([smhdw])", text, re.ASCII):
        try:
            return datetime.now(UTC) - timedelta(**{_UNITS[match[2]]: int(match[1])})
        except OverflowError:
            return datetime.min.replace(tzinfo=UTC)
    try:
        time = datetime.fromisoformat(text)
        return time if time.tzinfo else time.astimezone()
    except (ValueError, OverflowError) as exc:
        raise InvalidValueError(
            f"invalid time {text[:40]!r}", hint="say 30m, 12h, 7d or 2026-01-31T12:00Z"
        ) from exc


def _disk_id(text: str) -> UUID:
    """The id of a disk, given by name or by id. The store may have forgotten an id."""
    with contextlib.suppress(ValueError):
        return UUID(text)
    with session.backend() as b:
        return b.disks.get(text).id


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError as exc:
        raise InvalidValueError(f"invalid correlation id {text[:80]!r}") from exc


def _position(text: str) -> Position:
    from virt_sse.audit.record import Position

    if not (match := re.fullmatch(r"(\d{1,18}):([0-9a-f]{64})", text, re.ASCII)):
        raise InvalidValueError(f"invalid position {text[:100]!r}", hint="'virt-sse audit verify' prints one")
    return Position(int(match[1]), match[2])

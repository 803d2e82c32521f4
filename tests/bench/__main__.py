"""``python tests/bench``: speed of virt-sse, as ratios to peers measured in the same run.

The first table has all rows, the second the figures with a target. A missed target is marked but is not a
failure. The exit status is 1 when a benchmark ends with an error. A benchmark is skipped, with a message, if
the machine lacks its tools.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import clone
import command
import create
import customer
import data
import domain
import hook
import hsm
import iothreads
import machine
import plot
import process
import reencrypt
import rewrap
import scale
import snapshot
import start
import transfer
import virt_sse
from measurement import Bench, Row, Run
from virt_sse.cli.output import OutputFormat, print_rows
from virt_sse.errors import LabUnavailableError, VirtSseError, report
from virt_sse.lab import directories

BENCHES: Mapping[str, Bench] = {
    "create": create.measure,
    "clone": clone.measure,
    "domain": domain.measure,
    "start": start.measure,
    "hook": hook.measure,
    "command": command.measure,
    "data": data.measure,
    "process": process.measure,
    "import": transfer.measure,
    "reencrypt": reencrypt.measure,
    "snapshot": snapshot.measure,
    "rewrap": rewrap.measure,
    "scale": scale.measure,
    "customer": customer.measure,
    "hsm": hsm.measure,
    "iothreads": iothreads.measure,
}


@dataclass(slots=True)
class Results:
    """Results of a run.

    :ivar skipped: by benchmark, the requirements missing on this machine.
    :ivar failed: by benchmark, the error.
    """

    rows: list[Row] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def main() -> int:
    arguments = _parser().parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    began, clock = datetime.now(UTC), time.monotonic()
    try:
        with _scratch() as scratch:
            facts = machine.facts(scratch)
            results = Results()
            for name in arguments.only or BENCHES:
                _measure(name, Run(arguments.quick, scratch), results)
                document = {
                    "version": virt_sse.__version__,
                    "began": began.isoformat(timespec="seconds"),
                    "seconds": round(time.monotonic() - clock, 1),
                    "quick": arguments.quick,
                    "machine": facts,
                    "rows": [row.as_json() for row in results.rows],
                    "skipped": results.skipped,
                    "failed": results.failed,
                }
                arguments.json.write_text(json.dumps(document, indent=2) + "\n")
                if arguments.plot:
                    arguments.plot.write_text(plot.svg(document))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    _print(results, facts, time.monotonic() - clock)
    return 1 if results.failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python tests/bench", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples, less data; about a minute")
    parser.add_argument(
        "--only",
        action="append",
        choices=BENCHES,
        metavar="NAME",
        help=f"one of {', '.join(BENCHES)}; repeatable",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("bench-results.json"), metavar="PATH", help="default %(default)s"
    )
    parser.add_argument("--plot", type=Path, metavar="PATH", help="write the figures with a target as SVG")
    return parser


def _end(number: int, _frame: object) -> NoReturn:
    """Unwind by SystemExit, so that all contexts end their processes."""
    sys.exit(128 + number)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for the run. Folders of killed runs are removed along with the lab's."""
    base = Path(tempfile.gettempdir())
    directories.sweep(base)
    directory = directories.create(base)
    try:
        yield directory.path
    finally:
        directory.remove()


def _measure(name: str, run: Run, results: Results) -> None:
    """Add the rows of a benchmark, or why there are none."""
    print(f"measuring {name} ...", file=sys.stderr, flush=True)
    try:
        results.rows.extend(BENCHES[name](run))
    except LabUnavailableError as exc:
        results.skipped[name] = str(exc)
    except VirtSseError as exc:
        report(exc)
        results.failed[name] = str(exc)


def _print(results: Results, facts: Mapping[str, object], took: float) -> None:
    print("\n".join(f"{name.replace('_', ' ')}: {fact}" for name, fact in facts.items()), end="\n\n")
    rows = [row.as_cells() for row in results.rows]
    if rows:
        print_rows(rows, list(rows[0]), OutputFormat.TABLE)
        print("\nratio: speed relative to the peer; 2x is twice as fast, 0.5x half as fast\n")
    if aims := [row.as_aim() for row in results.rows if row.target]:
        print_rows(aims, list(aims[0]), OutputFormat.TABLE)
    for state, reasons in (("skipped", results.skipped), ("failed", results.failed)):
        for name, reason in reasons.items():
            print(f"{state}: {name}: {reason}")
    print(f"{took:.0f} s")


if __name__ == "__main__":
    sys.exit(main())

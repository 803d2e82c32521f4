"""``python -m soak``: kills operations at random moments, and prints a report.

The exit status is 1 if something did not hold after a kill; each such kill is printed with the command that
repeats exactly this kill.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import multiprocessing
import queue
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from soak.attempt import Attempts, Failure, Outcome
from soak.kill_points import KillPoint
from soak.operations import OPERATIONS, FileOperation
from soak.sites import FileSite
from soak.vault_attempt import VaultAttempts
from soak.vault_operations import VAULT_OPERATIONS, VaultOperation
from soak.vault_site import VaultSite

_BY_NAME: dict[str, FileOperation | VaultOperation] = {
    operation.name: operation for operation in (*OPERATIONS, *VAULT_OPERATIONS)
}
Task = tuple[str, int]


def main() -> int:
    arguments = _parser().parse_args()
    began = time.monotonic()
    if arguments.only:
        name, _, seed = arguments.only.rpartition(":")
        tasks: list[Task] = [(name, int(seed))]
    else:
        chosen = [name for name in _BY_NAME if not arguments.operation or arguments.operation in name]
        tasks = [(chosen[n % len(chosen)], arguments.seed + n // len(chosen)) for n in range(arguments.kills)]
    results = _run(tasks, arguments.workers, arguments.at)
    failures = [result for _, result in results if isinstance(result, Failure)]
    _report(results, time.monotonic() - began)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


def _run(tasks: list[Task], workers: int, at: KillPoint | None) -> list[tuple[str, Outcome | Failure]]:
    """Do *tasks* in *workers* processes, each with sites of its own; until SIGINT or SIGTERM."""
    context = multiprocessing.get_context("fork")
    done: Any = context.Queue()
    operations = sorted({name for name, _ in tasks})  # each stays with one worker, which measures it once
    shares = [[task for task in tasks if operations.index(task[0]) % workers == n] for n in range(workers)]
    processes = [context.Process(target=_work, args=(share, done, at)) for share in shares if share]
    for process in processes:
        process.start()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: list[tuple[str, Outcome | Failure]] = []
    try:
        for name, result in _results(done, processes, len(tasks)):
            results.append((name, result))
            if isinstance(result, Failure):
                print(f"FAILED {result}", file=sys.stderr, flush=True)
            elif len(results) % 10 == 0:
                said = f"{len(results)} of {len(tasks)}, last {name}: {result.value}"
                print(said, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
    for process in processes:
        process.join()
    return results


def _results(
    done: Any, processes: Sequence[BaseProcess], count: int
) -> Iterator[tuple[str, Outcome | Failure]]:
    """The results of the workers, as they come."""
    while count:
        try:
            yield done.get(timeout=1)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                yield "worker", Failure("worker", 0, None, "a worker ended early")
                return
        else:
            count -= 1


def _work(tasks: list[Task], done: Any, at: KillPoint | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="virt-sse-soak-")))
        files = functools.cache(lambda: Attempts(FileSite(_made(folder / "files"), stack)))
        vaults = functools.cache(lambda: VaultAttempts(VaultSite(_made(folder / "vault"), stack)))
        for name, seed in tasks:
            operation = _BY_NAME[name]
            if isinstance(operation, FileOperation):
                done.put((name, files()(operation, seed, at)))
            else:
                done.put((name, vaults()(operation, seed, at)))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _report(results: list[tuple[str, Outcome | Failure]], seconds: float) -> None:
    by_name: dict[str, Counter[str]] = defaultdict(Counter)
    for name, result in results:
        by_name[name]["failed" if isinstance(result, Failure) else result.value] += 1
    words = [*(outcome.value for outcome in Outcome), "failed"]
    total: Counter[str] = sum(by_name.values(), Counter())
    width = max(map(len, by_name), default=0)
    print(f"{'operation':{width}}  " + "  ".join(words))
    for name, counts in [*sorted(by_name.items()), ("all", total)]:
        print(f"{name:{width}}  " + "  ".join(f"{counts[word]:{len(word)}}" for word in words))
    print(f"{len(results)} kills in {seconds:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="number of kills (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="the first seed (default: 1)")
    parser.add_argument("--workers", type=int, default=2, help="number of processes (default: 2)")
    parser.add_argument("--operation", help="only operations with this in their name")
    parser.add_argument("--only", metavar="OPERATION:SEED", help="only this kill")
    parser.add_argument(
        "--at", type=KillPoint.parse, metavar="POINT", help="the moment, as printed: call=fsync:3"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""One kill of a vault's server or client, and the checks after the kill."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections.abc import Iterator
from random import Random

from soak.attempt import Failure, Outcome
from soak.kill_points import CALLS, Ended, KillBy, KillPoint, Measured, measure, run
from soak.vault_operations import VaultOperation
from soak.vault_site import VaultSite
from support.command_line import PROGRAM
from support.leftovers import Leftovers


class VaultAttempts:
    """Kills the operations of one vault; each operation is measured once."""

    def __init__(self, site: VaultSite) -> None:
        self._site = site
        self._measured: dict[str, Measured] = {}

    def __call__(
        self, operation: VaultOperation, seed: int, at: KillPoint | None = None
    ) -> Outcome | Failure:
        """Kill the server or client of *operation* at a moment that *seed* chooses, or at *at*."""
        with Leftovers() as self._site.leftovers:
            return self._reported(operation, seed, at)

    def _reported(self, operation: VaultOperation, seed: int, at: KillPoint | None) -> Outcome | Failure:
        point = at
        try:
            measured = self._measure(operation)
            point = at or _choose(operation, seed, measured)
            return self._attempt(operation, point)
        except Exception as exc:  # noqa: BLE001 -- every failure is reported, and the soak goes on
            self._site.restart()
            return Failure.of(exc, operation.name, seed, point)

    def _command(self, operation: VaultOperation) -> list[str]:
        return [str(PROGRAM), *operation.arguments(self._site)]

    def _run(self, command: list[str]) -> Ended:
        return run(command, environment=self._site.environment)

    def _measure(self, operation: VaultOperation) -> Measured:
        if operation.name not in self._measured:
            operation.prepare(self._site)
            trace, command = self._site.folder / "trace", self._command(operation)
            if operation.kills_server:
                with _strace(self._site.vault.pid, ["-o", str(trace), "-e", f"trace={CALLS}"]):
                    ended = self._run(command)
                names = re.findall(r"^\d+ +(\w+)\(", trace.read_text(errors="replace"), re.MULTILINE)
                measured = Measured(0.0, 0.0, tuple(names))
            else:
                measured, ended = measure(command, trace, environment=self._site.environment)
            assert ended.status == 0, f"undisturbed: {ended}"
            assert operation.state(self._site) == operation.after
            self._measured[operation.name] = measured
        return self._measured[operation.name]

    def _attempt(self, operation: VaultOperation, point: KillPoint) -> Outcome:
        site = self._site
        operation.prepare(site)
        before, command = operation.state(site), self._command(operation)
        if operation.kills_server:
            with _strace(site.vault.pid, ["-o", "/dev/null", *point.injection()]):
                ended = self._run(command)
            killed = not site.runs()
            site.restart()
        else:
            ended = self._run(point.around(command))
            killed = ended.killed
        assert "Traceback" not in ended.output, ended.output
        assert killed or point.by is not KillBy.CALL or ended.status == 0, f"undisturbed: {ended}"
        found = operation.state(site)
        is_acknowledged = ended.status == 0
        assert found == operation.after or (found == before and not is_acknowledged), f"{found}: {ended}"
        if found == operation.after and is_acknowledged:
            assert site.subject.name in site.audit().path.read_text(), "the change is not in the audit log"
        site.check_wrapped()
        site.check_home()
        self._repeat(operation, found)
        if not killed and is_acknowledged:
            return Outcome.NOT_KILLED
        return Outcome.AFTER if found == operation.after else Outcome.BEFORE

    def _repeat(self, operation: VaultOperation, found: str) -> None:
        """Run the command again: it succeeds, or says that nothing is left to do."""
        again = self._run(self._command(operation))
        assert "Traceback" not in again.output, again.output
        refused = found == operation.after and any(part in again.output for part in operation.refusals)
        assert again.status == 0 or refused, f"repeated: {again}"
        expected = operation.repeated if found == operation.after else None
        assert operation.state(self._site) == (expected or operation.after)
        self._site.bring_back()
        self._site.check_home()


def _choose(operation: VaultOperation, seed: int, measured: Measured) -> KillPoint:
    chance = Random(f"{operation.name}:{seed}")  # noqa: S311 -- a seed
    if not operation.kills_server:
        return KillPoint.choose(chance, measured)
    position = chance.randrange(len(measured.calls))
    call = measured.calls[position]
    return KillPoint(KillBy.ANY_CALL, measured.calls[: position + 1].count(call), call)


@contextlib.contextmanager
def _strace(pid: int, options: list[str]) -> Iterator[None]:
    """Trace all threads of a running process."""
    with subprocess.Popen(
        ["strace", "-f", *options, "-p", str(pid)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    ) as strace:
        assert strace.stderr
        assert b"attached" in strace.stderr.readline()
        drain = threading.Thread(target=strace.stderr.read)
        drain.start()
        try:
            yield
        finally:
            strace.terminate()  # detaches; ended already if the server was killed
            drain.join()

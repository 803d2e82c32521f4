"""The audit log: every key use, allowed or refused, in tamper-evident files.

``audit.jsonl`` holds one record per line. At 64 MiB, the file is renamed to ``audit-0001.jsonl`` and so on.
Each record contains the hash of the previous record, also across files, and a MAC under ``audit.key``. The
file ``audit.head`` names the newest record, because a chain alone does not reveal a truncated end.

A key use that cannot be recorded is refused: :meth:`AuditLog.append` returns once the record is durable, and
only then is a DEK handed out. A full disk therefore prevents domains from starting; running domains continue.

Tampering and its detection:

- The chain reveals changed, added, removed or moved records.
- The head reveals a truncated end.
- The MACs reveal recomputed hashes, unless the attacker has the key. On a host the key is stored apart from
  the log: access to an archive or to shipped logs is not enough.
- Not detected: restoring an older state of all files, including the head. No key is needed for this.
- Not detected: records rewritten by root on this machine, because root can read the key.

Against the last two, note regularly and elsewhere the position printed by ``virt-sse audit verify``, and
compare the log with ``--anchor``. The records of a key vault on another machine match these records by
correlation id. Root can also use a key without virt-sse; only the vault's log shows such a use.

To begin a new log, move all files of the old log away, including its key.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Self

from virt_sse.audit.check import Break, Line, VerifyReport, check
from virt_sse.audit.record import (
    GENESIS,
    LOST_HEAD,
    TORN_RECORD,
    AuditEntry,
    AuditRecord,
    Position,
    Result,
    head_mac,
    note,
    seal,
)
from virt_sse.errors import AuditError
from virt_sse.system.files import PRIVATE_FILE, private_folder, sync_folder, write_at, write_private

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from virt_sse.config import Config

_log = logging.getLogger(__name__)

_KEY_BYTES = 32
_LONGEST_LINE = 1 << 20
_POLL_SECONDS = 0.2
_HEAD = re.compile(rb"(\d{20}) ([0-9a-f]{64}) ([0-9a-f]{64})\n")
"""Fixed size: a single write within one sector replaces the head."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """State of the log at one moment.

    :ivar head: ``None`` when the head is missing or invalid.
    :ivar size: size of the newest file, in bytes.
    """

    key: bytes | None = field(repr=False)
    head: Position | None
    rolled: list[Path]
    newest: BinaryIO | None
    size: int

    def lines(self) -> Iterator[Line]:
        """All lines, oldest first."""
        for path in self.rolled:
            with path.open("rb") as file:
                yield from _lines(path, file, path.stat().st_size)
        if self.newest:
            self.newest.seek(0)
            yield from _lines(Path(self.newest.name), self.newest, self.size)

    def last(self, count: int) -> list[AuditEntry]:
        """Records in the newest *count* lines, oldest first; lines without a valid record are left out."""
        lines = _tail(self.newest.fileno(), self.size, count)[:-1] if self.newest else []
        for path in reversed(self.rolled):
            if (missing := count - len(lines)) <= 0:
                break
            with _opened(path, os.O_RDONLY) as file:
                lines = _tail(file, os.fstat(file).st_size, missing)[:-1] + lines
        return [entry for line in lines if (entry := _entry(line))]


class AuditLog:
    """An audit log. Many threads and processes may append concurrently.

    :param path: file of the newest records.
    :param key: file with the key of the MACs, made at the first append; by default ``audit.key`` beside the
        log.
    :param roll_size: size in bytes of a full file; the next record begins a new file.
    """

    def __init__(self, path: Path, *, key: Path | None = None, roll_size: int = 64 << 20) -> None:
        self.path = path
        self._head_path = path.with_suffix(".head")
        self._key_path = key or path.with_suffix(".key")
        self._roll_size = roll_size

    @classmethod
    def of_host(cls, config: Config) -> Self:
        """The log of this host's key uses. Its key is stored in the state directory, apart from the log."""
        return cls(config.log_directory / "audit.jsonl", key=config.state_directory / "audit.key")

    def files(self) -> list[Path]:
        """Existing files of the log, oldest first."""
        pattern = re.compile(rf"{re.escape(self.path.stem)}-(\d{{4,}}){re.escape(self.path.suffix)}")
        folder = self.path.parent
        found = {int(match[1]): match[0] for name in _names(folder) if (match := pattern.fullmatch(name))}
        rolled = [folder / found[number] for number in sorted(found)]
        return [*rolled, self.path] if self.path.exists() else rolled

    # Writing

    def append(self, record: AuditRecord) -> int:
        """Add *record* durably, and return its number.

        :raise AuditError: When the record cannot be written. The caller must then refuse the recorded action.
        """
        try:
            private_folder(self.path.parent)
            with _opened(self._head_path, os.O_RDWR | os.O_CREAT) as head:
                fcntl.flock(head, fcntl.LOCK_EX)  # the head's lock protects the whole log
                key, newest = self._begin(head)
                self._roll_if_full()
                with _opened(self.path, os.O_RDWR | os.O_CREAT) as file:
                    written = self._write(file, record, newest, key)
                    fcntl.flock(head, fcntl.LOCK_UN)
                    os.fdatasync(file)  # without the lock, so that the syncs of several writers become one
                fcntl.flock(head, fcntl.LOCK_EX)
                newest = _read_head(head, key)
                if newest is None or newest.seq < written.seq:
                    _write_head(head, written, key)
        except OSError as exc:
            raise AuditError(
                f"cannot write the audit log {self.path}: {exc.strerror}",
                hint="a key use that cannot be recorded is refused",
            ) from exc
        return written.seq

    def _begin(self, head: int) -> tuple[bytes, Position | None]:
        """The key, and the newest record according to the head; ``None`` when the head was lost.

        The key is the last file to be made for a new log: if the key exists, any other missing file was lost.
        """
        if (key := self._read_key()) is None:
            key = secrets.token_bytes(_KEY_BYTES)
            if not self.files():
                _write_head(head, GENESIS, key)
                os.fsync(head)
            private_folder(self._key_path.parent)
            write_private(self._key_path, key)
        return key, _read_head(head, key)

    def _roll_if_full(self) -> None:
        """Begin a new file when the newest is full, unless the newest ends with a torn record."""
        with contextlib.suppress(FileNotFoundError), _opened(self.path, os.O_RDONLY) as file:
            size = os.fstat(file).st_size
            if size >= self._roll_size and os.pread(file, 1, size - 1) == b"\n":
                os.fdatasync(file)  # otherwise the next file could become durable before this file
                *_, last = [self.path.with_stem(f"{self.path.stem}-0000"), *self.files()[:-1]]
                number = int(last.stem.rpartition("-")[2]) + 1
                self.path.rename(self.path.with_stem(f"{self.path.stem}-{number:04}"))

    def _write(self, file: int, record: AuditRecord, head: Position | None, key: bytes) -> Position:
        """Write *record* after the last record, preceded by notes about the log itself, if any."""
        size = os.fstat(file).st_size
        *complete, fragment = _tail(file, size, 1)
        start, lines, notes = size, b"", []
        last = _position(complete)
        if whole := _position([fragment]):  # only the newline is missing
            last, lines, fragment = whole, b"\n", b""
        elif fragment:
            start -= len(fragment)
            notes.append(note(record, TORN_RECORD, fragment.decode("ascii", "backslashreplace")))
        if not size and (rolled := self.files()[:-1]):
            with _opened(rolled[-1], os.O_RDONLY) as before:
                last = _position(_tail(before, os.fstat(before).st_size, 1)[:-1])
        if head is None:
            notes.append(note(record, LOST_HEAD, f"{self._head_path.name} was missing or invalid"))
        # After a kill, records are ahead of the head. Records behind the head mean removed records: the
        # chain then continues from the head, and the gap stays visible.
        position = max(head or GENESIS, last or GENESIS, key=lambda position: position.seq)
        for fields in (*notes, record.as_json()):
            line, position = seal(fields, position, key)
            lines += line
        try:
            write_at(file, lines, start)  # overwrites the fragment, contained in these lines
        except OSError:
            write_at(file, fragment, start)
            os.ftruncate(file, start + len(fragment))
            raise
        if not size:
            sync_folder(self.path.parent)
        return position

    # Reading

    def verify(self, anchor: Position | None = None) -> VerifyReport:
        """Verify the log line by line. Does not block writers.

        :param anchor: position of the newest record at an earlier time, noted elsewhere.
        :raise AuditError: When the log cannot be read.
        """
        with self._snapshot() as snapshot:
            head = snapshot.head or GENESIS
            report = check(self.path, snapshot.lines(), head=head, anchor=anchor, key=snapshot.key)
            if not snapshot.head and not report.broken and (snapshot.key or report.newest.seq):
                reason = "the log's head is missing or invalid"
                broken = Break(self._head_path, 1, report.newest.seq + 1, reason)
                return replace(report, broken=broken)
            return report

    def records(
        self,
        *,
        since: datetime | None = None,
        key: str | None = None,
        disk: UUID | None = None,
        result: Result | None = None,
        correlation: UUID | None = None,
    ) -> Iterator[AuditEntry]:
        """Records matching all given filters, oldest first; a line without a valid record is logged.

        :param key: as in a record, with or without the version after ``:`` or ``/``.
        :raise AuditError: When the log cannot be read.
        """
        exactly = {
            "disk": str(disk) if disk else None,
            "result": result.value if result else None,
            "correlation": str(correlation) if correlation else None,
        }
        wanted = {field: value for field, value in exactly.items() if value}.items()
        with self._snapshot() as snapshot:
            for line in snapshot.lines():
                if not (entry := _entry(line.text.removesuffix(b"\n"))):
                    _log.warning("%s, line %d: not a record, or altered", line.path, line.number)
                elif (
                    wanted <= entry.document.items()
                    and (key is None or entry.is_of_key(key))
                    and (since is None or entry.time >= since)
                ):
                    yield entry

    def tail(self, count: int, *, follow: bool = False) -> Iterator[AuditEntry]:
        """The newest *count* records, oldest first.

        :param follow: then wait for new records, endlessly.
        :raise AuditError: When the log cannot be read.
        """
        seen = 0
        with self._snapshot() as snapshot:
            entries = snapshot.last(count)
        while True:
            for entry in entries:
                if entry.seq > seen:
                    yield entry
                    seen = entry.seq
            if not follow:
                return
            time.sleep(_POLL_SECONDS)
            with self._snapshot() as snapshot:
                newest = snapshot.last(1)
                entries = snapshot.last(max(0, newest[0].seq - seen)) if newest else []

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[_Snapshot]:
        """Context of a consistent view of the log.

        :raise AuditError: When a file cannot be read, at any time within the context.
        """
        try:
            with contextlib.ExitStack() as opened:
                head, key = None, self._read_key()
                with contextlib.ExitStack() as locked:
                    with contextlib.suppress(FileNotFoundError):
                        descriptor = locked.enter_context(_opened(self._head_path, os.O_RDONLY))
                        fcntl.flock(descriptor, fcntl.LOCK_SH)
                        head = _read_head(descriptor, key)
                    files = self.files()
                    newest = opened.enter_context(files.pop().open("rb")) if self.path in files else None
                    size = os.fstat(newest.fileno()).st_size if newest else 0
                yield _Snapshot(key, head, files, newest, size)
        except OSError as exc:
            raise AuditError(f"cannot read the audit log {self.path}: {exc.strerror}") from exc

    def _read_key(self) -> bytes | None:
        try:
            key = self._key_path.read_bytes()
        except FileNotFoundError:
            return None
        if len(key) != _KEY_BYTES:
            raise AuditError(f"{self._key_path} holds {len(key)} bytes instead of {_KEY_BYTES}")
        return key


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _names(folder: Path) -> list[str]:
    try:
        return [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []


def _read_head(head: int, key: bytes | None) -> Position | None:
    """The head's position; ``None`` when the head is empty, malformed or not written with *key*."""
    if not (match := _HEAD.fullmatch(os.pread(head, 200, 0))):
        return None
    position = Position(int(match[1]), match[2].decode())
    authentic = key is None or hmac.compare_digest(match[3].decode(), head_mac(key, position))
    return position if authentic else None


def _write_head(head: int, position: Position, key: bytes) -> None:
    text = f"{position.seq:020} {position.hash} {head_mac(key, position)}\n".encode()
    write_at(head, text, 0)
    os.ftruncate(head, len(text))


def _lines(path: Path, file: BinaryIO, size: int) -> Iterator[Line]:
    number = 0
    while size > 0 and (text := file.readline(min(size, _LONGEST_LINE))):
        number, size = number + 1, size - len(text)
        yield Line(path, number, text)


def _tail(file: int, size: int, count: int) -> list[bytes]:
    """The last *count* complete lines of the first *size* bytes, then the remainder; without newlines."""
    window = 1024 * (count + 1)
    while True:
        start = max(0, size - window)
        lines = os.pread(file, size - start, start).split(b"\n")
        if start and len(lines) < count + 2:
            window *= 4
        else:
            return lines[-count - 1 :] if count else lines[-1:]


def _entry(line: bytes) -> AuditEntry | None:
    try:
        return AuditEntry.parse(line)
    except ValueError:
        return None


def _position(lines: list[bytes]) -> Position | None:
    """Position of the record in the last of *lines*, if valid."""
    entry = _entry(lines[-1]) if lines else None
    return entry.position if entry else None

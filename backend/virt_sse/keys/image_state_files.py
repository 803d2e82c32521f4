"""Files of a host about the freshness of its images: the host key, and the last known state of each image.

The files are apart from the store: an image must not pass as new because the store was lost or restored from
a backup, and the end of a domain does not load the store.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec

from virt_sse.errors import HostKeyError
from virt_sse.keys.key_file import KeyFile
from virt_sse.model.image_states import ImageState
from virt_sse.model.seal import HOST_KEY_BYTES, SealKey, derived
from virt_sse.system.documents import DocumentError, from_json
from virt_sse.system.files import (
    private_folder,
    single_writer_temporary,
    sync_folder,
    write_as_single_writer,
)

MOST_DELETED = 4096
"""Number of deleted disks whose last states are kept."""


class HostKeyFile:
    """The host key: 32 random bytes, mode 0600. Hosts that share images get a copy of the same file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = KeyFile(path, "host key")

    def provision(self) -> bool:
        """Make the key unless the file exists: whether made.

        :raise HostKeyError: When the file cannot be written.
        """
        return self._file.make(secrets.token_bytes(HOST_KEY_BYTES))

    def load(self) -> SealKey | None:
        """The key of the seals; ``None`` without a host key.

        :raise HostKeyError: When the file cannot be read, or is no host key.
        """
        content = self._read()
        return None if content is None else SealKey.of_host_key(content)

    def subkey(self, purpose: bytes) -> bytes:
        """A key of 32 bytes for one purpose; makes the host key at the first use.

        :raise HostKeyError: When the file cannot be read or written, or is no host key.
        """
        self.provision()
        content = self._read()
        if content is None:
            raise HostKeyError(f"the host key {self.path} was removed")
        return derived(content, purpose)

    def _read(self) -> bytes | None:
        content = self._file.read()
        if content is not None and len(content) != HOST_KEY_BYTES:
            raise HostKeyError(
                f"{self.path} holds {len(content)} bytes instead of {HOST_KEY_BYTES}",
                hint="restore the host key from a backup",
            )
        return content


class _State(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An :class:`ImageState` in JSON."""

    uses: int
    header: bytes
    inner: bytes | None = None


class ImageStateFiles:
    """The last known state of each image; a file per disk, named by the disk's id, replaced atomically.

    The files of deleted disks are kept in a folder of their own, the newest :data:`MOST_DELETED`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._deleted = folder / "deleted"

    def get(self, disk_id: UUID) -> ImageState | None:
        """The state of a disk's image; ``None`` before its first use.

        :raise HostKeyError: When the file cannot be read.
        """
        for path in (self._folder / str(disk_id), self._deleted / str(disk_id)):
            try:
                with path.open("rb") as file:
                    changed = os.fstat(file.fileno()).st_mtime
                    found = from_json(file.read(), _State)
            except FileNotFoundError:
                continue
            except (OSError, DocumentError) as exc:
                raise HostKeyError(f"cannot read {path}: {exc}") from exc
            deleted = datetime.fromtimestamp(changed, UTC) if path.parent == self._deleted else None
            return ImageState(found.uses, found.header, found.inner, deleted)
        return None

    def disk_ids(self) -> Iterator[UUID]:
        """The disks with a known state; none if the folder cannot be read."""
        try:
            with os.scandir(self._folder) as entries:
                names = [entry.name for entry in entries]
        except OSError:
            return
        for name in names:
            with contextlib.suppress(ValueError):  # the folder of deleted disks, a file being written
                yield UUID(name)

    def put(self, disk_id: UUID, state: ImageState) -> None:
        """Replace the state of a disk's image. After a power loss the state before may be back.

        The caller excludes other writers of the disk's state.

        :raise HostKeyError: When the file cannot be written.
        """
        content = msgspec.json.encode(_State(state.uses, state.header, state.inner))
        path = self._folder / str(disk_id)
        try:
            write_as_single_writer(private_folder(self._folder) / path.name, content)
            (self._deleted / path.name).unlink(missing_ok=True)
        except OSError as exc:
            raise HostKeyError(f"cannot write {path}: {exc.strerror}") from exc

    def mark_deleted(self, disk_id: UUID) -> None:
        """Note that a disk is deleted, if its state is known. The oldest note beyond the limit is forgotten.

        :raise HostKeyError: When the note cannot be made; the state stays as it is.
        """
        path, note = self._folder / str(disk_id), self._deleted / str(disk_id)
        try:
            if path.exists():
                private_folder(self._deleted)
                os.utime(path)
                path.rename(note)
                single_writer_temporary(path).unlink(missing_ok=True)
                sync_folder(self._deleted)
                self._forget_oldest()
        except OSError as exc:
            raise HostKeyError(f"cannot move {path} to {note}: {exc.strerror}") from exc

    def _forget_oldest(self) -> None:
        with os.scandir(self._deleted) as entries:
            notes = [(entry.stat().st_mtime, entry.path) for entry in entries]
        for _, path in sorted(notes)[:-MOST_DELETED]:
            Path(path).unlink(missing_ok=True)

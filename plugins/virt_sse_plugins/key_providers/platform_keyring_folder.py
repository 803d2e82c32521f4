"""Files of the platform's keyring: ``root.key`` and ``keyring.json``, mode 0600, in a folder of mode 0700."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from virt_sse.api import (
    PRIVATE_FILE,
    PRIVATE_FOLDER,
    KeyringError,
    private_folder,
    sync_folder,
    write_private,
)
from virt_sse_plugins.key_providers.platform_keyring import KEY_BYTES, Keyring, KeyringRootKey


class KeyringFolder:
    """Reads and changes the keyring in *directory*. Several threads and processes may do so concurrently.

    Provisioning writes ``root.key`` last, and no key is usable before. Therefore, if only one of the two
    files exists, the other file was lost, and is never recreated; except that ``root.key.new`` marks an
    interrupted provisioning.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._keyring_path = directory / "keyring.json"
        self._root_key_path = directory / "root.key"
        self._new_root_key_path = directory / "root.key.new"
        self._cached: tuple[object, Keyring] | None = None
        self._cache_lock = threading.Lock()

    def read(self) -> Keyring:
        """The current keyring; the files are read again only after a change.

        :raise KeyringError: When a file is missing, unreadable, accessible to other users or damaged, or when
            the two files do not match.
        """
        with self._cache_lock, _explain("read", self._keyring_path):
            # Determined before reading the files: a change in between is then noticed by the next call.
            identity = self._identity()
            if self._cached is None or self._cached[0] != identity:
                self._cached = (identity, self._parse(self._root_key_path))
            return self._cached[1]

    def change(self, change: Callable[[Keyring], Keyring]) -> Keyring:
        """Replace the keyring by the result of *change*, excluding other processes, and return the result.

        :raise KeyringError: As :meth:`read`; or when writing fails, and the keyring is unchanged.
        """
        self.read()  # gives a better error than the lock for an unusable folder
        with _explain("write", self._keyring_path), self._locked():
            changed = change(self.read())
            self._remove_strays()
            write_private(self._keyring_path, changed.dump())
            return changed

    def provision(self) -> bool:
        """Make root key and keyring if neither exists, or complete an interrupted earlier call.

        :return: whether anything was made.
        :raise KeyringError: As :meth:`read`, about existing files; or when writing fails.
        """
        with _explain("write", self._keyring_path):
            private_folder(self._directory)
            _require_private(self._directory, self._directory.stat(), PRIVATE_FOLDER)
            with self._locked():
                if self._root_key_path.exists():
                    self.read()
                    return False
                if not self._keyring_path.exists():
                    self._remove_strays()
                    keyring = Keyring.generate()
                    write_private(self._new_root_key_path, keyring.root_key.material)
                    write_private(self._keyring_path, keyring.dump())
                else:
                    self._require_unfinished()
                self._new_root_key_path.rename(self._root_key_path)
                sync_folder(self._directory)
        self.read()
        return True

    def forget(self) -> None:
        """Drop the cached keyring from memory."""
        with self._cache_lock:
            self._cached = None

    def _identity(self) -> object:
        try:
            folder = self._directory.stat()
            keyring = self._keyring_path.stat()
        except FileNotFoundError as exc:
            raise KeyringError(
                f"the platform's keyring is missing ({self._keyring_path})",
                hint="restore it from a backup; on a new host, make one with 'virt-sse host init'",
            ) from exc
        try:
            root_key = self._root_key_path.stat()
        except FileNotFoundError as exc:
            raise self._root_key_missing() from exc
        _require_private(self._directory, folder, PRIVATE_FOLDER)
        _require_private(self._keyring_path, keyring, PRIVATE_FILE)
        _require_private(self._root_key_path, root_key, PRIVATE_FILE)
        return [
            (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            for status in (keyring, root_key)
        ]

    def _require_unfinished(self) -> None:
        """Refuse a keyring without ``root.key``, unless ``root.key.new`` matches the keyring."""
        try:
            self._parse(self._new_root_key_path)
        except (FileNotFoundError, KeyringError) as exc:
            raise self._root_key_missing() from exc

    def _root_key_missing(self) -> KeyringError:
        return KeyringError(
            f"the root key of the platform's keyring is missing ({self._root_key_path})",
            hint="restore it from a backup; without it no disk under this keyring can be opened",
        )

    def _parse(self, root_key_path: Path) -> Keyring:
        material = root_key_path.read_bytes()
        if len(material) != KEY_BYTES:
            raise KeyringError(
                f"the root key has {len(material)} bytes instead of {KEY_BYTES} ({root_key_path})",
                hint="restore it from a backup",
            )
        return Keyring.parse(
            self._keyring_path.read_bytes(), KeyringRootKey(material), path=self._keyring_path
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclude all other writers, in any process; the lock ends with its process."""
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _remove_strays(self) -> None:
        """Remove the temporary files of killed writers."""
        for path in (self._keyring_path, self._new_root_key_path):
            for stray in self._directory.glob(f".{path.name}.*"):
                stray.unlink()


def _require_private(path: Path, status: os.stat_result, mode: int) -> None:
    if status.st_uid != os.geteuid():
        raise KeyringError(
            f"{path} belongs to user {status.st_uid}, not to the current user {os.geteuid()}",
            hint=f"chown {os.geteuid()} {path}",
        )
    if status.st_mode & 0o077:
        raise KeyringError(
            f"{path} is accessible to other users (mode {status.st_mode & 0o777:04o})",
            hint=f"chmod {mode:04o} {path}",
        )


@contextlib.contextmanager
def _explain(verb: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise KeyringError(f"cannot {verb} the platform's keyring ({path}): {exc.strerror}") from exc

"""Key files of a host: raw bytes, mode 0600."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from virt_sse.errors import HostKeyError
from virt_sse.system.files import private_folder, write_new

_OTHERS = 0o077
_LARGEST = 4096


@dataclass(frozen=True, slots=True)
class KeyFile:
    """A file with a key.

    :ivar what: the key's name in messages, e.g. ``host key``.
    """

    path: Path
    what: str

    def make(self, content: bytes) -> bool:
        """Write the key unless the file exists: whether written.

        :raise HostKeyError: When the file cannot be written.
        """
        if self.path.exists():
            return False
        try:
            private_folder(self.path.parent)
            with contextlib.suppress(FileExistsError):  # another process made the key meanwhile
                write_new(self.path, content)
                return True
        except OSError as exc:
            raise HostKeyError(f"cannot make the {self.what} {self.path}: {exc.strerror}") from exc
        return False

    def read(self) -> bytes | None:
        """The content; ``None`` without the file. Of a large file, the first 4096 bytes.

        :raise HostKeyError: When the file cannot be read, or is open to other users.
        """
        try:
            with self.path.open("rb") as file:
                is_open_to_others = os.fstat(file.fileno()).st_mode & _OTHERS
                content = file.read(_LARGEST)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise HostKeyError(f"cannot read the {self.what} {self.path}: {exc.strerror}") from exc
        if is_open_to_others:
            raise HostKeyError(f"{self.path} is open to other users", hint=f"chmod 600 {self.path}")
        return content

"""Marks: empty files named by UUIDs, which outlive a killed process."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from uuid import UUID

from virt_sse.system.files import PRIVATE_FILE, private_folder, sync_folder


class Marks:
    """The marks in a private folder, which is made with the first mark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def all(self) -> list[UUID]:
        """The marked UUIDs, in their order; files with other names are left out."""
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted(self.folder.iterdir()):
                with contextlib.suppress(ValueError):
                    found.append(UUID(path.name))
        return found

    def add(self, marked: UUID) -> None:
        """Make a mark, durably; an existing mark stays.

        :raise OSError: When the mark cannot be made.
        """
        path = private_folder(self.folder) / str(marked)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, PRIVATE_FILE))
        sync_folder(self.folder)

    def remove(self, marked: UUID) -> None:
        """Remove a mark, if any.

        :raise OSError: When the mark cannot be removed.
        """
        (self.folder / str(marked)).unlink(missing_ok=True)

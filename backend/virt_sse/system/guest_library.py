"""The XTS library for the QEMU processes of guests, which libvirt starts.

AppArmor's profile of these processes (abstraction ``libvirt-qemu``) allows libraries in QEMU's own folder.
``virt-sse host init --accelerate`` copies the library there and records the digest. A new version gets the
name by a rename: a process keeps the file that the process has mapped.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from virt_sse.system import acceleration
from virt_sse.system.acceleration import LIBRARY
from virt_sse.system.files import private_folder, shared_folder, sync_folder, write_private, write_shared
from virt_sse.system.running_process import MappedFile, mapped_files

FOLDER = "usr/lib/x86_64-linux-gnu/qemu"
"""QEMU's folder for libraries in Debian and Ubuntu; the library is for x86-64 only."""
RECORD = "guest-library"
_NETTLE = "libnettle.so.8"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_LARGEST = 16 << 20


class LibraryInUse(enum.Enum):
    """The XTS library in a process.

    ``INEFFECTIVE``: mapped, but the process does not have the nettle that the library replaces. ``UNKNOWN``:
    mapped under the library's name, but neither this version nor a recorded version.
    """

    CURRENT = "this version"
    EARLIER = "an earlier version"
    INEFFECTIVE = "no effect"
    UNKNOWN = "an unknown library"
    ABSENT = "none"


@dataclass(frozen=True, slots=True)
class GuestLibrary:
    """The library installed for the QEMU processes of guests.

    :ivar path: of the library; the value of ``LD_PRELOAD``.
    :ivar record: of the digests (SHA-256) of the installed versions, one a line; present while wanted.
    """

    path: Path
    record: Path

    @classmethod
    def of(cls, root: Path, state_directory: Path) -> Self:
        """The library of the host with the folders *root* and *state_directory*."""
        return cls(root / FOLDER / LIBRARY.name, state_directory / RECORD)

    @property
    def is_wanted(self) -> bool:
        """Whether the library was installed, and not removed by :meth:`remove`."""
        return self.record.exists()

    def install(self) -> bool:
        """Install the package's library, or replace another version.

        :return: whether the file was missing or different.
        :raise OSError: When a file cannot be read or written.
        """
        content = LIBRARY.read_bytes()
        wanted = hashlib.sha256(content).hexdigest()
        if self.is_wanted and self.obstacle() is None and digest(self.path) == wanted:
            return False
        private_folder(self.record.parent)
        lines = dict.fromkeys([*self._recorded(), wanted])
        write_private(self.record, "".join(f"{line}\n" for line in lines).encode())
        shared_folder(self.path.parent)
        write_shared(self.path, content)
        return True

    def remove(self) -> bool:
        """Remove the library; processes that have it mapped keep it. Whether there was something to remove.

        :raise OSError: When a file cannot be removed.
        """
        found = False
        for path in (self.path, self.record):
            if path.exists():
                found = True
                path.unlink()
                sync_folder(path.parent)
        return found

    def obstacle(self) -> str | None:
        """The reason why QEMU must not or cannot load the file, in words; ``None`` without such a reason."""
        if not self.path.exists():
            return f"{self.path} is missing"
        if reason := acceleration.obstacle(self.path):
            return reason
        if self._version(digest(self.path)) is LibraryInUse.UNKNOWN:
            return f"{self.path} is not a library that virt-sse has installed"
        return None

    @property
    def is_outdated(self) -> bool:
        """Whether the package has a library, and the installed file is another one."""
        current = digest(LIBRARY)
        return current is not None and digest(self.path) != current

    def in_use(self, pid: int) -> LibraryInUse:
        """The library in a running process; the worst where several are mapped."""
        files = mapped_files(pid)
        found = {self._version(_digest_of(pid, file)) for file in files if file.basename == LIBRARY.name}
        for worst in (LibraryInUse.UNKNOWN, LibraryInUse.EARLIER, LibraryInUse.CURRENT):
            if worst in found:
                is_effective = any(file.basename.startswith(_NETTLE) for file in files)
                known = worst is not LibraryInUse.UNKNOWN
                return LibraryInUse.INEFFECTIVE if known and not is_effective else worst
        return LibraryInUse.ABSENT

    def _version(self, found: str | None) -> LibraryInUse:
        if found is not None and found == digest(LIBRARY):
            return LibraryInUse.CURRENT
        return LibraryInUse.EARLIER if found in self._recorded() else LibraryInUse.UNKNOWN

    def _recorded(self) -> list[str]:
        try:
            return [line for line in self.record.read_text().splitlines() if _DIGEST.fullmatch(line)]
        except (OSError, UnicodeDecodeError):
            return []


def digest(path: Path) -> str | None:
    """The SHA-256 of a file, in hexadecimal; ``None`` if the file cannot be read or is too large."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size > _LARGEST:
                return None
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _digest_of(pid: int, file: MappedFile) -> str | None:
    return digest(Path(f"/proc/{pid}/map_files/{file.range}"))

"""Domains to be started once libvirtd answers.

At the start of a host, libvirtd starts autostarted domains before libvirtd serves any client. The libvirt
hook needs libvirt, so the hook refuses these domains and leaves a note here. The agent then starts the
domains; see
:mod:`virt_sse.agent.deferred_start`. The notes do not outlive a restart of the host.
"""

from __future__ import annotations

import contextlib
from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import StageError
from virt_sse.libvirt.domain_definition import DomainDefinition
from virt_sse.system.files import private_folder, write_private


class DeferredStarts:
    """The notes, as empty files named by the domains' UUIDs."""

    def __init__(self, config: Config) -> None:
        self._folder = config.deferred_start_directory

    def add(self, definition: DomainDefinition) -> None:
        """Note that a domain is to be started.

        :raise StageError: When the note cannot be written.
        """
        try:
            write_private(private_folder(self._folder) / str(definition.uuid), b"")
        except OSError as exc:
            raise StageError(f"cannot write to {self._folder}: {exc.strerror}") from exc

    def all(self) -> list[UUID]:
        """The UUIDs of the noted domains; files with other names are left out."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for path in self._folder.iterdir():
                with contextlib.suppress(ValueError):
                    found.append(UUID(path.name))
        return found

    def remove(self, domain_id: UUID) -> None:
        """Remove the note of a domain, if any."""
        (self._folder / str(domain_id)).unlink(missing_ok=True)

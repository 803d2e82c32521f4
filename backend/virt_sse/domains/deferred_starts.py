"""Domains to be started once libvirtd answers.

At the start of a host, libvirtd starts autostarted domains before libvirtd serves any client. The libvirt
hook needs libvirt, so the hook refuses these domains and leaves a note here. The agent then starts the
domains; see :mod:`virt_sse.agent.deferred_start`. The notes do not outlive a restart of the host.
"""

from __future__ import annotations

from uuid import UUID

from virt_sse.config import Config
from virt_sse.errors import StageError
from virt_sse.system.marks import Marks


class DeferredStarts(Marks):
    """The notes, as marks of the domains' UUIDs."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.deferred_start_directory)

    def add(self, marked: UUID) -> None:
        """Note that a domain is to be started.

        :raise StageError: When the note cannot be written.
        """
        try:
            super().add(marked)
        except OSError as exc:
            raise StageError(f"cannot write to {self.folder}: {exc.strerror}") from exc

"""Host cache: nbdkit(1) with its cache filter, next to the image: holds ciphertext only.

The cache is an unnamed file, and ends with the process (nbdkit-cache-filter(1)).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from virt_sse.libvirt.users import ROOT
from virt_sse.model.layers import HostCache, HostCaching
from virt_sse.stages.locked_process import Command
from virt_sse.stages.stage_process import ExpectedEvidence, ExportSource, RecordField, StageProcess
from virt_sse.system import acceleration
from virt_sse.system.files import PRIVATE_FOLDER, shared_folder

_IMAGE_BLOCK = "cache-min-block-size=4096"
"""Block size above an image; nbdkit's default is 65536. A write of part of a block reads the rest first.

With 4096, random writes of 4 KiB are twice as fast. The price: 64 MiB of memory for a full cache of 1 TiB,
and sequential writes at 0.6 of the speed without a cache. Above an export, as earlier versions start it, each
block written through takes a round trip: sequential writes would fall to 15 MiB/s.
"""
_PASS_THROUGH = 0o711
_MODES = {HostCaching.READ_ONLY: "cache=writethrough", HostCaching.READ_WRITE: "cache=writeback"}


class HostCacheProcess(StageProcess[HostCache]):
    """An nbdkit process. A guest's flush reaches the source in either mode."""

    name = "cache"
    title = "host cache"
    stage_type = HostCache
    record_field = RecordField("caching", HostCaching)
    inner_socket = "cache"
    growth_hint = "stop the domain, or set the disk's caching to None"

    @classmethod
    def to_record(cls, stages: Sequence[HostCache]) -> str:
        return (stages[0].caching if stages else HostCaching.NONE).value

    @classmethod
    def from_record(cls, value: object) -> Sequence[HostCache]:
        caching = HostCaching(value)
        return () if caching is HostCaching.NONE else (HostCache(caching),)

    @property
    def keeps_acknowledged_writes(self) -> bool:
        """A write-through cache's writes are in the kernel's page cache; a write-back cache's may not be."""
        return self.stage.caching is HostCaching.READ_ONLY

    def prepare(self) -> None:
        parent = shared_folder(self.place.cache_directory)
        os.chown(parent, ROOT.uid, ROOT.gid)  # earlier versions gave the folder to their single user
        parent.chmod(_PASS_THROUGH)
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=PRIVATE_FOLDER)
        os.chown(self._folder, self.place.user.uid, self.place.user.gid, follow_symlinks=False)

    def writable(self) -> Sequence[Path]:
        return [*super().writable(), self._folder]

    def command(self, listening: Sequence[int]) -> Command:
        (served,) = listening
        return Command(
            ["nbdkit", "--foreground", "--filter=cache", *self._source(), self._mode, "cache-on-read=true"],
            listening=served,
            environment={"TMPDIR": str(self._folder), **acceleration.ALLOCATOR},
        )

    def evidence(self) -> ExpectedEvidence:
        arguments = {self._mode: f"the host cache does not work as {self.stage.caching.value}"}
        if isinstance(self.place.source, ExportSource):
            problem = f"the host cache is not on the socket {self.place.source.socket}"
            arguments[f"socket={self.place.source.socket}"] = problem
        folder = self.place.cache_directory  # earlier versions had no folder per disk
        return ExpectedEvidence(
            data=f"the host cache, in {folder}", arguments=arguments, unnamed_files=folder
        )

    @property
    def _folder(self) -> Path:
        return self.place.cache_directory / str(self.place.disk_id)

    @property
    def _mode(self) -> str:
        return _MODES[self.stage.caching]

    def _source(self) -> list[str]:
        source = self.place.source
        if isinstance(source, ExportSource):
            return ["nbd", f"socket={source.socket}", f"export={source.export}"]
        return ["file", f"file={source.path}", _IMAGE_BLOCK]

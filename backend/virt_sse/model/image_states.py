"""The last known state of a disk's image, for comparison with the image."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True, slots=True)
class ImageState:
    """The state of an image after its last use, as this host has it.

    :ivar uses: the use counter.
    :ivar header: digest of the LUKS header and the active keyslots in the file.
    :ivar inner: the same of the inner volume of nested volumes; ``None`` until first seen.
    :ivar deleted: when the disk was deleted, if so.
    """

    uses: int
    header: bytes
    inner: bytes | None = None
    deleted: datetime | None = None

"""Files with credentials: only their owner may read them."""

from __future__ import annotations

import os
from pathlib import Path

from virt_sse.errors import CredentialError

_LONGEST = 1 << 20


def read_secret_file(path: Path, kind: str) -> bytes:
    """Read a file with a credential.

    :param kind: what the file is, for messages.
    :raise CredentialError: When the file cannot be read, or is open to other users.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise CredentialError(f"the {kind} {path} is open to others", hint=f"chmod go= {path}")
            return file.read(_LONGEST)
    except OSError as exc:
        raise CredentialError(f"cannot read the {kind} {path}: {exc.strerror}") from exc

"""The file of a deletion certificate."""

from __future__ import annotations

import os
from pathlib import Path

from virt_sse.errors import CertificateError
from virt_sse.model.disks import Disk
from virt_sse.system.files import write_new


def refuse_taken(file: Path) -> None:
    """Refuse a file for a certificate, before the deletion begins.

    :raise CertificateError: When the file exists or cannot be made.
    """
    if os.path.lexists(file):
        raise CertificateError(f"{file} exists already")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise CertificateError(f"cannot make a file in {file.parent}")


def write_certificate(file: Path, content: bytes, disk: Disk) -> None:
    """Write the certificate about a deleted disk into a new file.

    :raise CertificateError: When the file cannot be written; the store keeps the certificate.
    """
    try:
        write_new(file, content)
    except OSError as exc:
        raise CertificateError(
            f"erased disk {disk.name}, but cannot write {file}: {exc.strerror}",
            hint=f"'virt-sse certificate show {disk.id}' prints the certificate",
        ) from exc

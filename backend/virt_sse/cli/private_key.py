"""Reading private keys from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from virt_sse.errors import InvalidValueError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey


def read_private_key(file: Path) -> RSAPrivateKey:
    """Read the RSA private key in *file*, PEM without a passphrase.

    :raise InvalidValueError: When the file cannot be read, or has no such key.
    """
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(file.read_bytes(), None)
    except OSError as exc:
        raise InvalidValueError(f"cannot read {file}: {exc.strerror}") from exc
    except (ValueError, TypeError) as exc:
        raise InvalidValueError(f"{file} has no private key in PEM without a passphrase") from exc
    if not isinstance(key, RSAPrivateKey):
        raise InvalidValueError(f"{file} has no RSA key")
    return key

"""The digest of a LUKS1 header: notices a header that was rebuilt around the same DEK.

Covers the fields (bytes 0 to 591) and the material of each active keyslot, i.e. everything from which a
passphrase yields a volume key. The material of an inactive keyslot yields nothing.
"""

from __future__ import annotations

import hashlib

from virt_sse.qemu.image_header import Read
from virt_sse.qemu.luks import HEADER_END, Luks1Header


def header_digest(read: Read, luks_offset: int) -> bytes:
    """Compute the digest, 32 bytes, of the validated LUKS header at *luks_offset*."""
    fields = read(luks_offset, HEADER_END)
    digest = hashlib.sha256(fields)
    header = Luks1Header.parse(fields)
    for keyslot in header.keyslots:
        if keyslot.active:
            digest.update(read(luks_offset + keyslot.offset, header.volume_key_bytes * keyslot.stripes))
    return digest.digest()

"""Numbers and layouts of the NBD protocol (NBD ``doc/proto.md``), with simple replies."""

from __future__ import annotations

import struct

MAGIC, OPTIONS_MAGIC = b"NBDMAGIC", b"IHAVEOPT"
FIXED_NEWSTYLE, NO_ZEROES = 1, 2
OPTION = struct.Struct(">8sII")
"""``IHAVEOPT``, the option, and the length of its data."""
EXPORT_NAME = 1
READ, WRITE, DISCONNECT, FLUSH, WRITE_ZEROES = 0, 1, 2, 3, 6
REQUEST, REPLY = struct.Struct(">IHHQQI"), struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
LONGEST_REQUEST = 32 << 20
"""Maximum length of a request that every server supports, in bytes."""

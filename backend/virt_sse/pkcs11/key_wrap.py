"""AES key wrap (RFC 3394) inside a token; the payload is a temporary object of the session."""

from __future__ import annotations

from typing import Any

from PyKCS11 import CKA_VALUE, CKM_AES_KEY_WRAP, Mechanism

from virt_sse.pkcs11 import objects

_KEY_WRAP = Mechanism(CKM_AES_KEY_WRAP, None)


def wrap(session: Any, handle: Any, payload: bytes) -> bytes:
    """Wrap *payload* with the key of *handle*.

    :raise PyKCS11Error: When the token refuses.
    """
    value = session.createObject(objects.payload_template(payload))
    try:
        return bytes(session.wrapKey(handle, value, _KEY_WRAP))
    finally:
        session.destroyObject(value)


def unwrap(session: Any, handle: Any, wrapped: bytes) -> bytes:
    """Unwrap the payload of *wrapped*.

    :raise PyKCS11Error: When *wrapped* was not made with this key, or the token refuses.
    """
    value = session.unwrapKey(handle, wrapped, objects.payload_template(), _KEY_WRAP)
    try:
        return bytes(session.getAttributeValue(value, (CKA_VALUE,))[0])
    finally:
        session.destroyObject(value)

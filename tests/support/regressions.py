"""Inputs that once made a parser fail: found by the fuzzers, or by reading."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from support.parsers import PARSERS


def _other_curve() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.replace(b"\n", b"\\n")


def _private_key() -> bytes:
    """The private key in the seed of the credential file."""
    (content,) = _SEEDS["credential-file"]
    start = content.index(b"-----BEGIN PRIVATE KEY-----")
    return content[start : content.index(b'"', start)]


_SEEDS = {parser.name: parser.seeds for parser in PARSERS}
_WHOLE = b""
"""In place of a piece of the seed: the input is new as a whole."""

_CHANGES: tuple[tuple[str, bytes, bytes], ...] = (
    ("luks-header", b"aes\0", b"aes\x1b"),
    ("qemu-img-info", b'"virtual-size": 1048576', b'"virtual-size": "1"'),
    ("qemu-img-info", b'{"data-file"', b'[{"data-file"'),
    ("qemu-img-info", b'{"type": "qcow2", "data"', b'{"type": "qcow2", "DATA"'),
    ("qemu-img-info", b'{"filename": "/c"}', b"null"),
    ("block-graph", b'"name": "file"', b'"name": []'),
    ("block-graph", b'"edges": [', b'"edges": [{"parent": 1, "child": 1, "name": "file"}, '),
    ("block-graph", b'"edges": [', b'"edges": [{"parent": 9, "child": 2, "name": "file"}, '),
    ("block-graph", b'"file": "/a"', b'"file": 1'),
    ("block-graph", b'"format-specific": {', b'"format-specific": [], "x": {'),
    ("block-graph", b'"/machine/peripheral/d/virtio-backend"', b"1"),
    ("domain-xml-of-a-running-domain", b":service", b":serv\xffice"),
    ("domain-xml", b'at-host="on"', b'at-host="' + b"9" * 40_000 + b'"'),
    ("secret-usage-id", _WHOLE, b"virt-sse:" + b"x" * 9000),
    ("stage-record", b"a.qcow2", b"a\\u0000"),
    ("overlay-commit-record", b"a.overlay", b"a\\u0000"),
    ("configuration", b'"/d"', b'"/d\\u0000"'),
    ("configuration", b"timeout = 30.0", b"timeout = 1e300"),
    ("configuration", b"poll-seconds = 2", b"poll-seconds = 1e300"),
    ("keyring", b'"id": "', b'"id": "\\u001b'),
    ("audit-since", _WHOLE, b"2026-01-31T12:" * 300),
    ("audit-anchor", _WHOLE, b"12:" * 2000),
    ("pkcs11-uri", _WHOLE, b"pkcs11:" * 700),
    ("hsm-key-name", _WHOLE, b"pkcs11:token=" + b"a" * 5000),
    ("cipher", _WHOLE, b"aes" * 2000),
    ("agent-answer", _WHOLE, b"HTTP/1.0 409 x\r\n\r\n" + b"[" * 100_000),
    ("agent-answer", _WHOLE, b'HTTP/1.0 409 x\r\n\r\n{"error": "a", "hint": ["b"]}'),
    ("vault-assertion-claims", b'"jti": "a"', b'"jti": "\\ud800"'),
    ("vault-settings", b"example:8443", b"example:$443"),
    ("token-answer", b"a.b.c", b"a\\r\\nb"),
    ("token-answer", b"a.b.c", b"\\u2028"),
    ("token-answer", b"900", b"9" * 400),
    ("management-answer", b'{"value"', b'{"error": "x", "error_description": "\\u001b[2J", "value"'),
    ("credential-file", b"-----BEGIN CERTIFICATE-----", b"\\u0661"),
    ("credential-file", _private_key(), _other_curve()),
)


def regressions() -> list[tuple[str, bytes]]:
    """Names of parsers, and inputs."""
    found = []
    for name, old, new in _CHANGES:
        if old == _WHOLE:
            found.append((name, new))
            continue
        changed = [seed.replace(old, new) for seed in _SEEDS[name] if old in seed]
        assert changed, f"no seed of {name} has {old!r}"
        found += [(name, content) for content in changed]
    return found

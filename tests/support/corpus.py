"""The corpus of hostile inputs, each with the expected refusal, generated from a seed.

Images are sparse files without a DEK: headers of images of ours, with changes that the storage can make
(:mod:`support.hostile_images`), alone and in pairs.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.header_seeds import ENVELOPE, ROOM, luks_header, qcow2_image
from support.hostile_images import LUKS, QCOW2, Qcow2
from support.parsers.domains import DOMAIN
from virt_sse.model.envelope import Envelope

SEED = 20260131
_PAIRS = 60
_PREFIX = struct.Struct(">8sHHQ")
_LUKS_AT = 4096
"""Offset of the LUKS header in :func:`~support.header_seeds.qcow2_image`."""
_CANARY = Path("/etc/virt-sse-canary")


@dataclass(frozen=True, slots=True)
class Case:
    """An input.

    :ivar reasons: the refusal's message has one of these; empty for an input to be accepted.
    """

    name: str
    content: bytes
    reasons: tuple[str, ...] = ()


def _changed(base: bytes, change: str, luks_at: int) -> tuple[bytes, str]:
    """An image with a *change*, and the expected reason of the refusal."""
    content = bytearray(base)
    if change in QCOW2:
        header = Qcow2(bytes(base[:512].ljust(4096, b"\0")))
        do, reason = QCOW2[change]
        do(header, _CANARY)
        content[:512] = header.content[:512]
        return bytes(content), reason
    offset, layout, value, reason = LUKS[change]
    struct.pack_into(layout, content, luks_at + offset, value)
    return bytes(content), reason


def images(seed: int = SEED) -> Iterator[Case]:
    """Images: single and double, qcow2 and raw, unchanged, with each change, and with pairs of changes."""
    chosen = random.Random(seed)  # noqa: S311 -- a corpus, not a key
    for number, kind in enumerate(("single", "customer", "double")):
        slot = ENVELOPE[number].encode()
        bases = {"qcow2": (qcow2_image(envelope=slot), _LUKS_AT), "raw": (luks_header(envelope=slot), 0)}
        for name, (base, luks_at) in bases.items():
            changes = [*QCOW2, *LUKS] if name == "qcow2" else [*LUKS]
            yield Case(f"{name} {kind}", base)
            for change in changes if kind == "double" else ():
                content, reason = _changed(base, change, luks_at)
                yield Case(f"{name} {kind}, {change}", content, (reason,))
            for _ in range(_PAIRS // 6):
                one, other = chosen.sample(changes, 2)
                content, reason = _changed(base, one, luks_at)
                content, second = _changed(content, other, luks_at)
                yield Case(f"{name} {kind}, {one} and {other}", content, (reason, second))
            cut = chosen.randrange(len(MAGICS[name]), luks_at + 592)
            yield Case(f"{name} {kind}, zeros from byte {cut} on", base[:cut], ("",))


MAGICS = {"qcow2": b"QFI\xfb", "raw": b"LUKS\xba\xbe"}


def _sealed(body: bytes, *, version: int = 1, generation: int = 1, length: int | None = None) -> bytes:
    prefix = _PREFIX.pack(b"virt-sse", version, len(body) if length is None else length, generation)
    return prefix + body + hashlib.sha256(prefix + body).digest()


def envelopes() -> Iterator[Case]:
    """Slots of an envelope; the checksum is right where not named, as any writer of the image can make it."""
    for envelope in ENVELOPE:
        yield Case(f"{envelope.encryption_type.value}", envelope.encode())
    document = json.loads(_body(ENVELOPE[2]))
    yield Case("empty slot", bytes(1536), ("no envelope",))
    yield Case("version 3", _sealed(_body(ENVELOPE[0]), version=3), ("version 3",))
    yield Case("JSON in version 2", _sealed(_body(ENVELOPE[0]), version=2), ("expected `object`",))
    yield Case("altered", ENVELOPE[0].encode().replace(b"default", b"DEFAULT"), ("damaged",))
    yield Case("length beyond the slot", _sealed(_body(ENVELOPE[0]), length=0xFFFF), ("damaged",))
    yield Case("no body", _sealed(b""), ("malformed JSON",))
    for generation in (0, 2**31, 2**64 - 1):
        sealed = _sealed(_body(ENVELOPE[0]), generation=generation)
        yield Case(f"generation {generation}", sealed, (f"generation {generation}",))
    yield Case("nested deeply", _sealed(b"[" * 1400), ("nested too deeply", "malformed JSON"))
    for field, value, reason in (
        ("disk", "../../etc", "hexadecimal UUID"),
        ("disk", 1, "got `int`"),
        ("encryption-type", "None", "invalid enum value"),
        ("encryption-set", "x", "hexadecimal UUID"),
        ("created", "yesterday", "isoformat"),
        ("deks", {}, "got `object`"),
        ("name", "a\0b", "character NUL"),
        ("name", "\ud800", "UTF-8"),
    ):
        yield _envelope_case({**document, field: value}, f"{field} {value!r}", reason)
    for field, value, reason in (
        ("cipher", "null", "unknown cipher"),
        ("dek", "%%%", "base64"),
        ("key", ["a"], "length 3"),
        ("slot", 1, "got `int`"),
    ):
        deks = [{**document["deks"][0], field: value}, document["deks"][1]]
        yield _envelope_case({**document, "deks": deks}, f"{field} of a DEK {value!r}", reason)


def _envelope_case(document: dict[str, Any], name: str, reason: str) -> Case:
    return Case(name, _sealed(json.dumps(document).encode()), (reason,))


def _body(envelope: Envelope) -> bytes:
    content = envelope.encode()
    return content[_PREFIX.size : _PREFIX.size + _PREFIX.unpack_from(content)[2]]


def domains() -> Iterator[Case]:
    """Domain XML as the hook receives it."""
    usage = "virt-sse:6e2a0c0e-8d1f-4c58-9c63-0a1c62d7a9b1:service"
    yield Case("a domain", DOMAIN.encode())
    yield Case(
        "no UUID", DOMAIN.replace("<uuid>", "<id>").replace("</uuid>", "</id>").encode(), ("no valid UUID",)
    )
    for name, old, new, reason in (
        ("a DTD", "<domain ", '<!DOCTYPE d [<!ENTITY a "b">]><domain ', "document type declarations"),
        ("an external entity", "<name>web", "<name>&e;", "undefined entity"),
        ("no end", "</domain>", "", "no element found"),
        ("a secret without a slot", usage, usage.removesuffix(":service"), "no slot"),
        ("a secret without a UUID", usage, "virt-sse:x:service", "unknown secret"),
        ("a slot with a line break", usage, usage + "&#10;x", "invalid slot"),
        ("a TPM without a UUID", "<encryption secret='6e", "<encryption secret='z", "unknown secret"),
        ("a DAC label beyond the user ids", "+64055", "+4294967295", "not as a user and group"),
        ("a generation beyond the store", 'generation="1"', 'generation="99999999999"', "at most 9 digits"),
        ("a generation in other digits", 'generation="1"', 'generation="\u0661"', "at most 9 digits"),
        ("an odd temporary disk", "10737418240", "1000", "cannot have 1000 bytes"),
        ("encryption at host neither on nor off", 'at-host="on"', 'at-host="\u2028"', "metadata is invalid"),
        ("metadata twice", "</metadata>", _metadata() + "</metadata>", "two elements"),
    ):
        assert old in DOMAIN
        yield Case(name, DOMAIN.replace(old, new, 1).encode(), (reason,))
    deep = DOMAIN.replace("<devices>", "<a>" * 300 + "</a>" * 300 + "<devices>")
    yield Case("deep nesting", deep.encode(), ("nested deeper than 256",))
    many = DOMAIN.replace("<devices>", "<a/>" * 100_000 + "<devices>")
    yield Case("many elements", many.encode(), ("more than 100000 elements",))
    yield Case("another document", b"<network/>", ("a <network> element",))
    yield Case("bytes that are not UTF-8", DOMAIN.encode().replace(b"web", b"w\xffb"), ("no valid UTF-8",))
    yield Case("17 MiB", DOMAIN.replace("web", "w" * (17 << 20)).encode(), ("larger than 16 MiB",))


def _metadata() -> str:
    start = DOMAIN.index("<virt-sse:vm")
    return DOMAIN[start : DOMAIN.index("</metadata>")]


def write_image(case: Case, path: Path) -> Path:
    """Write the image of a case to *path*, sparse."""
    with path.open("wb") as file:
        file.write(case.content)
        file.truncate(ROOM)
    return path

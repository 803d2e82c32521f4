"""The document that the agent sends to the page's process: all that the page shows, and no key material."""

from __future__ import annotations

from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import msgspec

T = TypeVar("T")


class _Part(msgspec.Struct, frozen=True, kw_only=True):
    pass


class LayerPart(_Part, frozen=True, kw_only=True):
    """A layer of a disk.

    :ivar process: ``guest`` (the guest's QEMU), ``cache`` (a host cache) or ``storage`` (a storage daemon).
    :ivar cipher: ``None`` for a cache, which holds ciphertext.
    :ivar key: the KEK of the layer's DEK, ``provider:name``.
    """

    process: str
    detail: str = ""
    cipher: str | None = None
    slot: str | None = None
    key: str | None = None
    version: str | None = None


class DiskPart(_Part, frozen=True, kw_only=True):
    """A disk or a copy.

    :ivar deleted: time of the deletion of a deleted disk; *scheduled_purge*: of its purge.
    :ivar layers: guest first.
    :ivar problem: why the layers are unknown.
    """

    id: UUID
    name: str
    kind: str
    state: str
    size: int
    format: str
    path: str
    sku: str
    encryption_type: str
    encryption_set: str | None
    caching: str
    created: datetime
    generation: int
    deleted: datetime | None = None
    scheduled_purge: datetime | None = None
    layers: tuple[LayerPart, ...] = ()
    problem: str | None = None


class DomainDiskPart(_Part, frozen=True, kw_only=True):
    """A disk of a domain.

    :ivar disk_id: the disk of ours; ``None`` for any other disk.
    """

    target: str
    place: str
    disk_id: UUID | None
    is_encrypted: bool
    read_only: bool


class DomainPart(_Part, frozen=True, kw_only=True):
    """A domain of this host.

    :ivar state: ``running``, ``paused`` or ``off``.
    """

    id: UUID
    name: str
    state: str
    encryption_at_host: bool
    disks: tuple[DomainDiskPart, ...] = ()


class WatchedDomainPart(_Part, frozen=True, kw_only=True):
    """The agent's findings about a running domain.

    :ivar revoked: the reason of a revocation.
    :ivar plaintext: unencrypted images with data of the domain's encrypted disks.
    """

    name: str
    revoked: str | None
    paused: bool
    plaintext: tuple[str, ...]


class SetPart(_Part, frozen=True, kw_only=True):
    """A disk encryption set."""

    id: UUID
    name: str
    key: str
    version: str | None
    automatic_rotation: bool
    action: str
    grace_seconds: int


class KeyStatePart(_Part, frozen=True, kw_only=True):
    """The state of a key version in use by a running domain."""

    key: str
    version: str
    state: str


class EffectPart(_Part, frozen=True, kw_only=True):
    """What the agent would do with a running domain if a key were disabled."""

    key: str
    domain_id: UUID
    action: str
    grace_seconds: int


class JobPart(_Part, frozen=True, kw_only=True):
    """Work in progress.

    :ivar fraction: from 0.0 to 1.0; ``None`` if unknown.
    """

    kind: str
    subject: str
    detail: str
    fraction: float | None = None


class UsePart(_Part, frozen=True, kw_only=True):
    """A record of the audit log: a use of a key."""

    seq: int
    time: str
    component: str
    actor: str
    action: str
    key: str
    version: str | None
    disk: str | None
    slot: str | None
    domain: str | None
    result: str
    reason: str | None


class FaultPart(_Part, frozen=True, kw_only=True):
    """A fault of the host's set-up, or a part of this document that cannot be read."""

    part: str
    problem: str
    remedy: str | None = None


class HostPart(_Part, frozen=True, kw_only=True):
    """The host and its agent.

    :ivar last_look: time of the agent's last look at libvirt's domains.
    :ivar surveyed: time of the list of domains.
    """

    name: str
    version: str
    began: str
    libvirt: str
    libvirt_connected: bool
    last_look: str | None
    poll_seconds: float
    surveyed: datetime | None = None


class Overview(_Part, frozen=True, kw_only=True):
    """All that the page shows.

    :ivar uses: the newest records of the audit log, oldest first.
    :ivar last_uses: the newest record of each key version among the records read.
    :ivar records_read: number of records of the audit log read for *last_uses*.
    """

    time: datetime
    host: HostPart
    disks: tuple[DiskPart, ...] = ()
    domains: tuple[DomainPart, ...] = ()
    watched: tuple[WatchedDomainPart, ...] = ()
    sets: tuple[SetPart, ...] = ()
    key_states: tuple[KeyStatePart, ...] = ()
    effects: tuple[EffectPart, ...] = ()
    jobs: tuple[JobPart, ...] = ()
    uses: tuple[UsePart, ...] = ()
    last_uses: tuple[UsePart, ...] = ()
    records_read: int = 0
    faults: tuple[FaultPart, ...] = ()


class Settings(_Part, frozen=True, kw_only=True):
    """The first message to the process.

    :ivar group: id of the group whose members may connect to the Unix socket, beside root.
    :ivar loopback: ``HOST:PORT`` of the loopback socket; ``None`` without one.
    :ivar token: the secret of requests on the loopback socket.
    :ivar user: user and group id of the process; ``None`` to stay as started.
    """

    group: int | None
    loopback: str | None
    token: str | None
    user: int | None

    def __repr__(self) -> str:
        return f"Settings(loopback={self.loopback!r})"


def encode(message: Overview | Settings) -> bytes:
    """The message's bytes, its length first. Lone surrogates, of names that are not UTF-8, are replaced."""
    try:
        content = msgspec.msgpack.encode(message)
    except UnicodeEncodeError:
        content = msgspec.msgpack.encode(_utf8(msgspec.to_builtins(message)))
    return len(content).to_bytes(4, "big") + content


def decode(content: bytes, kind: type[T]) -> T:
    """The message in *content*, without its length.

    :raise ValueError: When *content* is malformed.
    """
    return msgspec.msgpack.decode(content, type=kind)


def _utf8(value: Any) -> Any:
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, dict):
        return {name: _utf8(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_utf8(each) for each in value]
    return value
